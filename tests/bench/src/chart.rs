// SPDX-License-Identifier: GPL-2.0

//! The chart: a bar for each cell, what an I/O takes with rnbd.ko in parts of what it takes with
//! nbd.ko.

use std::path::Path;

use plotters::prelude::*;

use crate::Outcome;
use crate::report::Row;
use crate::sample::{Client, Mode};

const ROW_PIXELS: u32 = 22;
const HEAD_PIXELS: u32 = 56;
const WIDTH_PIXELS: u32 = 900;
/// Where the bars begin, and how long one is that is as long as nbd.ko's.
const LABEL_PIXELS: i32 = 260;
const WHOLE_PIXELS: f64 = 480.0;

/// Draws the modes below one another.
pub fn draw(path: &Path, parts: &[(Mode, &[Row])]) -> Outcome<()> {
    let height: u32 = parts
        .iter()
        .map(|(_, rows)| HEAD_PIXELS + ROW_PIXELS * rows.len() as u32)
        .sum();
    let area = SVGBackend::new(path, (WIDTH_PIXELS, height + 10)).into_drawing_area();
    area.fill(&WHITE)?;
    let text = |size: i32| ("sans-serif", size).into_font().color(&BLACK);
    let mut y = 0;
    for (mode, rows) in parts {
        let title = match mode {
            Mode::Cost => "Instructions for an I/O (nbd.ko = 1; shorter is better)",
            Mode::Remote => {
                "Instructions for an I/O of a client's machine alone (nbd.ko = 1; shorter is better)"
            }
            Mode::Wall => "Time for an I/O (nbd.ko = 1; shorter is better)",
        };
        area.draw_text(title, &text(16), (10, y + 20))?;
        let top = y + HEAD_PIXELS as i32 - 10;
        y = top;
        for row in *rows {
            let label = format!("{} {}", row.setting, row.cell);
            area.draw_text(&label, &text(12), (10, y + 4))?;
            if let Some(relative) = row.relative(Client::Rnbd) {
                let end = LABEL_PIXELS + (relative.min(1.3) * WHOLE_PIXELS) as i32;
                let color = if relative <= 1.0 {
                    RGBColor(46, 125, 50)
                } else {
                    RGBColor(198, 40, 40)
                };
                area.draw(&Rectangle::new(
                    [(LABEL_PIXELS, y + 2), (end, y + ROW_PIXELS as i32 - 4)],
                    color.filled(),
                ))?;
                area.draw_text(&format!("{relative:.2}"), &text(12), (end + 6, y + 4))?;
            }
            y += ROW_PIXELS as i32;
        }
        let one = LABEL_PIXELS + WHOLE_PIXELS as i32;
        area.draw(&PathElement::new([(one, top), (one, y)], BLACK))?;
        y += 10;
    }
    area.present()?;
    Ok(())
}
