// SPDX-License-Identifier: GPL-2.0

//! From samples to tables, JSON and a chart.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde::Serialize;

use crate::Outcome;
use crate::chart;
use crate::latency;
use crate::sample::{Client, Mode, Sample};
use crate::scale;

/// The samples of one client in one cell, summed up.
#[derive(Clone, Debug, Serialize)]
pub struct Figures {
    pub rounds: usize,
    /// Median.
    pub ns_per_io: f64,
    /// Largest minus smallest, as a part of the median.
    pub spread: f64,
    pub mib_per_s: f64,
    pub p50_us: Option<f64>,
    pub p99_us: Option<f64>,
    pub cpu_us_per_io: Option<f64>,
    pub kernel_threads_us_per_io: Option<f64>,
}

/// A line of the table.
#[derive(Debug, Serialize)]
pub struct Row {
    pub setting: String,
    pub cell: String,
    pub clients: BTreeMap<Client, Figures>,
    /// See [`Row::relative`].
    relative: BTreeMap<Client, f64>,
    /// See [`Row::interval`].
    intervals: BTreeMap<Client, (f64, f64)>,
}

impl Row {
    /// What an I/O takes, in parts of what it takes with nbd.ko: median of the rounds, since what
    /// disturbs one of them mostly disturbs all who were measured in it.
    pub fn relative(&self, client: Client) -> Option<f64> {
        self.relative.get(&client).copied()
    }

    /// Where that median lies with 95 % certainty, by the ranks of the rounds. Less than six rounds
    /// cannot tell: it is all of their range then.
    fn interval(&self, client: Client) -> Option<(f64, f64)> {
        self.intervals.get(&client).copied()
    }
}

#[derive(Serialize)]
struct Summary {
    mode: Mode,
    rows: Vec<Row>,
    /// Geometric means of [`Row::relative`].
    means: BTreeMap<Client, f64>,
}

/// Reads `directory/*.jsonl`, prints tables, and writes `summary.json` and `chart.svg` there.
pub fn report(directory: &Path) -> Outcome<()> {
    let scale = directory.join("scale.jsonl");
    if scale.exists() {
        scale::report(&scale)?;
    }
    let connect = directory.join("connect.jsonl");
    if connect.exists() {
        latency::report(&connect)?;
    }
    let samples = read(directory)?;
    if samples.is_empty() {
        return Ok(());
    }
    let mut summaries = Vec::new();
    for mode in [Mode::Cost, Mode::Remote, Mode::Wall] {
        let of_mode: Vec<&Sample> = samples.iter().filter(|s| s.mode == mode).collect();
        if of_mode.is_empty() {
            continue;
        }
        let rows = rows(&of_mode);
        print_table(mode, &rows);
        let means = means(&rows);
        summaries.push(Summary { mode, rows, means });
    }
    let json = serde_json::to_string_pretty(&summaries)?;
    fs::write(directory.join("summary.json"), json)?;
    let parts: Vec<(Mode, &[Row])> = summaries.iter().map(|s| (s.mode, &*s.rows)).collect();
    chart::draw(&directory.join("chart.svg"), &parts)
}

fn read(directory: &Path) -> Outcome<Vec<Sample>> {
    let mut samples = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        if matches!(name, Some("cost.jsonl" | "remote.jsonl" | "wall.jsonl")) {
            for line in fs::read_to_string(&path)?.lines() {
                // Whatever else was said in the guest is not for here.
                if line.starts_with('{') {
                    samples.push(serde_json::from_str(line)?);
                }
            }
        }
    }
    Ok(samples)
}

/// In the order in which the cells were measured first.
fn rows(samples: &[&Sample]) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    for sample in samples {
        let known = |row: &Row| row.setting == sample.setting && row.cell == sample.cell;
        if rows.iter().any(known) {
            continue;
        }
        let mut by_client: BTreeMap<Client, Vec<&Sample>> = BTreeMap::new();
        for other in samples {
            if other.setting == sample.setting && other.cell == sample.cell {
                by_client.entry(other.client).or_default().push(other);
            }
        }
        let parts = |client: &Client| {
            let samples = by_client[client].iter();
            let parts = samples.filter_map(|sample| {
                let nbd = by_client.get(&Client::Nbd)?;
                let same_round = nbd.iter().find(|other| other.round == sample.round)?;
                Some(sample.ns_per_io / same_round.ns_per_io)
            });
            sorted(parts)
        };
        let relative = |client: &Client| Some((*client, middle(&parts(client))?));
        let interval = |client: &Client| Some((*client, interval(&parts(client))?));
        rows.push(Row {
            setting: sample.setting.clone(),
            cell: sample.cell.clone(),
            relative: by_client.keys().filter_map(relative).collect(),
            intervals: by_client.keys().filter_map(interval).collect(),
            clients: by_client
                .into_iter()
                .map(|(client, samples)| (client, figures(&samples)))
                .collect(),
        });
    }
    rows
}

fn figures(samples: &[&Sample]) -> Figures {
    let all = |of: &dyn Fn(&Sample) -> Option<f64>| median(samples.iter().filter_map(|s| of(s)));
    let times = samples.iter().map(|s| s.ns_per_io);
    let ns_per_io = median(times.clone()).unwrap_or(f64::NAN);
    let most = times.clone().fold(0.0, f64::max);
    let least = times.fold(f64::INFINITY, f64::min);
    Figures {
        rounds: samples.len(),
        ns_per_io,
        spread: (most - least) / ns_per_io,
        mib_per_s: all(&|s| Some(s.mib_per_s)).unwrap_or(f64::NAN),
        p50_us: all(&|s| s.p50_us),
        p99_us: all(&|s| s.p99_us),
        cpu_us_per_io: all(&|s| s.cpu_us_per_io),
        kernel_threads_us_per_io: all(&|s| s.kernel_threads_us_per_io),
    }
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}

fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    middle(&sorted(values))
}

fn middle(sorted: &[f64]) -> Option<f64> {
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        len if len % 2 == 0 => Some((sorted[middle - 1] + sorted[middle]) / 2.0),
        _ => Some(sorted[middle]),
    }
}

/// The narrowest pair of values, as far from either end, between which the median lies with 95 %
/// certainty.
fn interval(sorted: &[f64]) -> Option<(f64, f64)> {
    let (count, last) = (sorted.len() as f64, sorted.len().checked_sub(1)?);
    // How likely it is that so many values, and that at most so many, are below the median.
    let mut probability = 0.5f64.powf(count);
    let mut below = probability;
    let mut rank = 0;
    loop {
        probability *= (count - rank as f64) / (rank + 1) as f64;
        below += probability;
        if below > 0.025 {
            return Some((sorted[rank], sorted[last - rank]));
        }
        rank += 1;
    }
}

fn means(rows: &[Row]) -> BTreeMap<Client, f64> {
    let mut means = BTreeMap::new();
    for client in [Client::Rnbd, Client::Fio, Client::Floor, Client::Sendfile] {
        let logs: Vec<f64> = rows
            .iter()
            .filter_map(|row| row.relative(client))
            .map(f64::ln)
            .collect();
        if !logs.is_empty() {
            let mean = logs.iter().sum::<f64>() / logs.len() as f64;
            means.insert(client, mean.exp());
        }
    }
    means
}

fn print_table(mode: Mode, rows: &[Row]) {
    match mode {
        Mode::Cost => println!(
            "Cost: thousands of instructions for an I/O, everything included\n\n{:<13} {:<20} {:>8} {:>8} {:>7} {:>7} {:>7} {:>7}",
            "setting", "cell", "nbd.ko", "rnbd.ko", "ratio", "spread", "fio", "floor"
        ),
        Mode::Remote => println!(
            "Remote: thousands of instructions for an I/O, of a client's machine alone\n\n{:<13} {:<20} {:>8} {:>8} {:>7} {:>7} {:>7} {:>8}",
            "setting", "cell", "nbd.ko", "rnbd.ko", "ratio", "spread", "floor", "sendfile"
        ),
        Mode::Wall => println!(
            "Wall: I/Os in a second, latency, CPU time for an I/O in microseconds (kernel threads' of it)\n\n{:<14} {:<20} {:>9} {:>9} {:>6} {:>9} {:>15} {:>15} {:>15} {:>15}",
            "setting",
            "cell",
            "nbd.ko",
            "rnbd.ko",
            "faster",
            "95 %",
            "nbd p50/p99 us",
            "rnbd p50/p99",
            "nbd CPU",
            "rnbd CPU"
        ),
    }
    for row in rows {
        match mode {
            Mode::Cost => print_cost(row, [Client::Fio, Client::Floor]),
            Mode::Remote => print_cost(row, [Client::Floor, Client::Sendfile]),
            Mode::Wall => print_wall(row),
        }
    }
    for (client, mean) in means(rows) {
        let (mean, what) = match mode {
            Mode::Cost | Mode::Remote => (mean, "cost"),
            Mode::Wall => (1.0 / mean, "speed"),
        };
        println!("{client:?}: {mean:.3} of nbd.ko's {what}, geometric mean");
    }
    let worst = rows
        .iter()
        .filter_map(|row| Some((row.relative(Client::Rnbd)?, row)))
        .max_by(|a, b| a.0.total_cmp(&b.0));
    if let Some((relative, row)) = worst {
        let worst = match mode {
            Mode::Cost | Mode::Remote => relative,
            Mode::Wall => 1.0 / relative,
        };
        println!("Worst: {worst:.3}, {} {}", row.setting, row.cell);
    }
    println!();
}

fn print_cost(row: &Row, references: [Client; 2]) {
    let cost = |client| {
        row.clients
            .get(&client)
            .map_or(String::from("-"), |f| format!("{:.1}", f.ns_per_io / 2e3))
    };
    let ratio = |client| {
        row.relative(client)
            .map_or(String::from("-"), |ratio| format!("{ratio:.2}"))
    };
    println!(
        "{:<13} {:<20} {:>8} {:>8} {:>7} {:>6.1}% {:>7} {:>7}",
        row.setting,
        row.cell,
        cost(Client::Nbd),
        cost(Client::Rnbd),
        ratio(Client::Rnbd),
        spread(row) * 100.0,
        ratio(references[0]),
        ratio(references[1])
    );
}

fn spread(row: &Row) -> f64 {
    let of = |client| row.clients.get(&client).map_or(0.0, |f| f.spread);
    of(Client::Nbd).max(of(Client::Rnbd))
}

fn print_wall(row: &Row) {
    let of = |client| row.clients.get(&client);
    let rate = |client| {
        of(client).map_or(String::from("-"), |f| {
            let rate = 1e9 / f.ns_per_io;
            if rate < 100.0 {
                format!("{rate:.2}")
            } else {
                format!("{rate:.0}")
            }
        })
    };
    let two = |a: Option<f64>, b: Option<f64>, shape: &str| match (a, b) {
        (Some(a), Some(b)) => match shape {
            "/" => format!("{a:.0}/{b:.0}"),
            _ => format!("{a:.1} ({b:.1})"),
        },
        _ => String::from("-"),
    };
    let interval = row.interval(Client::Rnbd);
    let interval = interval.map(|(least, most)| format!("{:.2}-{:.2}", 1.0 / most, 1.0 / least));
    let latency = |client| of(client).map_or(String::new(), |f| two(f.p50_us, f.p99_us, "/"));
    let cpu = |client| {
        of(client).map_or(String::new(), |f| {
            two(f.cpu_us_per_io, f.kernel_threads_us_per_io, "(")
        })
    };
    println!(
        "{:<14} {:<20} {:>9} {:>9} {:>6.2} {:>9} {:>15} {:>15} {:>15} {:>15}",
        row.setting,
        row.cell,
        rate(Client::Nbd),
        rate(Client::Rnbd),
        row.relative(Client::Rnbd).map_or(f64::NAN, |r| 1.0 / r),
        interval.unwrap_or_default(),
        latency(Client::Nbd),
        latency(Client::Rnbd),
        cpu(Client::Nbd),
        cpu(Client::Rnbd)
    );
}
