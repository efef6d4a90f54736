// SPDX-License-Identifier: GPL-2.0

//! Lists the exports of a server.

use serde::Serialize;

use crate::cli::{ExportsArgs, ServerArgs};
use crate::failure::Failure;
use crate::negotiate::{Export, Handshake, Listed, Problem};
use crate::server::Server;
use crate::structured::Wanted;
use crate::text::{or_dash, plain, say, say_json, size, table};
use crate::uri::NbdUri;
use crate::wire::{Opt, flag_names};

/// What is known of an export; null for what the server does not tell.
#[derive(Serialize)]
struct Line {
    name: String,
    description: Option<String>,
    size: Option<u64>,
    flags: Option<Vec<String>>,
    minimum_block_size: Option<u32>,
    preferred_block_size: Option<u32>,
    maximum_payload: Option<u32>,
    /// Whether the server has them.
    structured_replies: Option<bool>,
}

/// # Errors
///
/// The step that failed, and why.
pub fn run(args: &ExportsArgs) -> Result<(), Failure> {
    let server = Server::new(&args.uri, &args.server, Wanted::IfOffered)?;
    let (_, mut handshake) = server.reach()?;
    let lines = ask(&server, &mut handshake, &args.uri.export)?;
    handshake.abort();
    if args.json {
        return say_json(&lines);
    }
    say(&render(&lines));
    Ok(())
}

/// The size that a server tells of an export.
///
/// # Errors
///
/// The step that failed, and why.
pub fn size_of(uri: &NbdUri, args: &ServerArgs) -> Result<u64, Failure> {
    let server = Server::new(uri, args, Wanted::No)?;
    let (_, mut handshake) = server.reach()?;
    let info = |problem| server.explain_option(problem, Opt::Info);
    let export = handshake.info(&uri.export).map_err(info)?;
    handshake.abort();
    Ok(export.size)
}

/// All exports, or the one that was named.
fn ask(server: &Server<'_>, handshake: &mut Handshake, name: &str) -> Result<Vec<Line>, Failure> {
    if !name.is_empty() {
        let info = |problem| server.explain_option(problem, Opt::Info);
        let export = handshake.info(name).map_err(info)?;
        let listed = Listed {
            name: name.to_owned(),
            description: None,
        };
        return Ok(vec![line(listed, Some(export))]);
    }
    let list = handshake.list();
    let list = list.map_err(|problem| server.explain_option(problem, Opt::List))?;
    list.into_iter()
        .map(|listed| describe(server, handshake, listed))
        .collect()
}

/// A server may list an export and not describe it.
fn describe(
    server: &Server<'_>,
    handshake: &mut Handshake,
    listed: Listed,
) -> Result<Line, Failure> {
    match handshake.info(&listed.name) {
        Ok(export) => Ok(line(listed, Some(export))),
        Err(Problem::Refused { .. }) => Ok(line(listed, None)),
        Err(problem) => Err(server.explain_option(problem, Opt::Info)),
    }
}

fn line(listed: Listed, export: Option<Export>) -> Line {
    let sizes = export.as_ref().and_then(|export| export.block_sizes);
    let described = export
        .as_ref()
        .and_then(|export| export.description.clone());
    Line {
        name: listed.name,
        description: listed.description.or(described),
        size: export.as_ref().map(|export| export.size),
        flags: export.as_ref().map(|export| flag_names(export.flags)),
        minimum_block_size: sizes.map(|sizes| sizes.minimum),
        preferred_block_size: sizes.map(|sizes| sizes.preferred),
        maximum_payload: sizes.map(|sizes| sizes.max_payload),
        structured_replies: export.map(|export| export.structured_replies),
    }
}

fn render(lines: &[Line]) -> String {
    let row = |line: &Line| {
        [
            format!("\"{}\"", plain(&line.name)),
            or_dash(line.size.map(size)),
            or_dash(line.minimum_block_size),
            or_dash(line.preferred_block_size),
            or_dash(line.maximum_payload.map(|bytes| size(bytes.into()))),
            or_dash(line.flags.as_ref().map(|flags| flags.join(","))),
            or_dash(line.description.as_deref().map(plain)),
        ]
    };
    let head = [
        "EXPORT",
        "SIZE",
        "MIN",
        "PREFERRED",
        "MAX",
        "FLAGS",
        "DESCRIPTION",
    ];
    table(head, &lines.iter().map(row).collect::<Vec<_>>())
}
