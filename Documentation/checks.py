# SPDX-License-Identifier: GPL-2.0
#
# A Sphinx extension. Pages link to files of the repository by their paths, which a git host understands;
# in HTML such a link leads to the page that was made of the file. It also compares the pages with the
# repository: a file, an anchor, a test or a target of the Makefile that a page names and that does not exist
# is a warning. So is a file of the driver that is missing in the tree that the page on the design shows.

import re
from fnmatch import fnmatch
from pathlib import Path

from docutils import nodes
from sphinx.util import logging

TOP = Path(__file__).resolve().parent.parent
log = logging.getLogger(__name__)

# "group::test", with a "*" in it or nothing behind "::"; paths in Rust code begin with one of those names.
TEST = re.compile(r"(?!(?:block|core|crate|kapi|kernel|loom|std)::)[a-z]\w*(?:::[a-z0-9_*]+)*(?:::)?")
# How "testing.rst" explains names.
PLACEHOLDERS = {"module::test", "group::test"}
FILE = re.compile(r"(?:\.ci|Documentation|kapi|pure|rnbd_\w+|tests|tools)/[\w./*-]+|rnbd\w*\.rs|\w+\.rst")
TARGET = re.compile(r"^(?:[$#] )?make ([a-z][a-z_-]*)", re.M)
PATTERN = re.compile(r"make (?:check|check-debug|misuse) [^\n]*?\bT=\"?([\w:,]+)")
# A line of a tree: the indentation, one or more paths, and what they contain.
BRANCH = re.compile(r"( *)((?:[\w./*-]+ )*[\w./*-]+) {2,}\S.*")
# What is a path even where it stands alone: it has a dot, a slash or a star, or begins with a capital letter.
PATH = re.compile(r".*[./*].*|[A-Z]\w+")
DESIGN = "Documentation/design"


def guest_tests():
    """The names that the guest's test program gives its tests."""
    top = TOP / "tests/guest/src/tests"
    for file in top.rglob("*.rs"):
        group = [part for part in file.relative_to(top).with_suffix("").parts if part != "mod"]
        for function in re.findall(r"\btest!\((\w+)\)", file.read_text()):
            yield "::".join([*group, function])


def other_tests():
    for file in TOP.glob("tests/misuse/*.rs"):
        yield f"misuse::{file.stem}"
    sources = [TOP / "tests/guest/src/checkers.rs", *TOP.glob("tests/host/src/*.rs"), *TOP.glob("tests/fuzz/src/*.rs")]
    for file in sources:
        for function in re.findall(r"\bfn (\w+)", file.read_text()):
            # What "models!" in tests/host/src/parts.rs makes is in a module of its own.
            yield f"{file.stem}::{function}"
            yield f"{file.stem}::hold::{function}"


class Names:
    """What there is to be named."""

    def __init__(self):
        self.tests = {*guest_tests(), *other_tests()}
        lines = re.findall(r"^([a-z_ -]+):", (TOP / "Makefile").read_text(), re.M)
        self.targets = {target for line in lines for target in line.split()}

    def has_test(self, name):
        if name.endswith("::"):
            return any(test.startswith(name) for test in self.tests)
        return any(fnmatch(test, name) or fnmatch(test, name + "::*") for test in self.tests)

    def missing(self, text, is_block):
        """What the literal `text` names and is not there."""
        if not is_block and "::" in text and TEST.fullmatch(text) and text not in PLACEHOLDERS:
            if not self.has_test(text):
                yield f"no test is called {text}"
        if not is_block and FILE.fullmatch(text):
            if not any(any(place.glob(text)) for place in (TOP, TOP / "Documentation")):
                yield f"there is no file {text}"
        for target in TARGET.findall(text):
            if target not in self.targets:
                yield f"the Makefile has no target {target}"
        for patterns in PATTERN.findall(text):
            for pattern in patterns.split(","):
                if not any(pattern in test for test in self.tests):
                    yield f"no test's name contains {pattern}"


def branches(text):
    """The depth and the paths of each line of a tree; nothing if the literal block `text` shows no tree."""
    lines = [BRANCH.fullmatch(line) for line in text.splitlines() if line.strip()]
    if len(lines) < 5 or not all(lines):
        return []
    tree = [(len(line[1]), line[2].split()) for line in lines]
    return tree if all(PATH.fullmatch(path) for _, paths in tree for path in paths) else []


def check_tree(text):
    """Returns the files that a tree shows, and the paths in it that do not exist."""
    files, missing, parents = set(), [], []
    for depth, paths in branches(text):
        while parents and parents[-1][0] >= depth:
            parents.pop()
        directory = parents[-1][1] if parents else TOP
        for path in paths:
            found = list(directory.glob(path.rstrip("/")))
            if path.endswith("/"):
                found = [place for place in found if place.is_dir()]
            if not found:
                missing.append(str((directory / path).relative_to(TOP)))
            files.update(place for place in found if place.is_file())
        # What is indented below a Rust module is in the directory that has the module's name.
        parents.append((depth, (directory / paths[0].rstrip("/")).with_suffix("")))
    return files, missing


def check_literals(app, doctree):
    for node in doctree.findall(lambda node: isinstance(node, (nodes.literal, nodes.literal_block))):
        is_block = isinstance(node, nodes.literal_block)
        text = node.astext() if is_block else " ".join(node.astext().split())
        for complaint in app.names.missing(text, is_block):
            log.warning(complaint, location=node)
        if is_block:
            files, missing = check_tree(text)
            for path in missing:
                log.warning(f"there is no file {path}", location=node)
            if app.env.docname == DESIGN:
                app.shown_files |= files


def has_anchor(doctree, anchor):
    return any(anchor in node["ids"] for node in doctree.findall(nodes.Element))


def resolve_link(app, page, node):
    """Makes a link to a file one to a page, or to nothing where HTML has no page for the file."""
    path, _, anchor = node["refuri"].partition("#")
    env = app.env
    file = (Path(env.doc2path(page)).parent / path).resolve() if path else Path(env.doc2path(page))
    target = env.path2doc(str(file))
    if target in env.all_docs:
        if anchor and not has_anchor(env.get_doctree(target), anchor):
            log.warning(f"{file.name} has no anchor {anchor}", location=node)
        if path:
            node["internal"] = True
            node["refuri"] = app.builder.get_relative_uri(page, target) + (f"#{anchor}" if anchor else "")
    elif file.exists():
        node.replace_self(node.children)
    else:
        log.warning(f"there is no file {path}", location=node)


def resolve_links(app, doctree, page):
    for node in list(doctree.findall(nodes.reference)):
        uri = node.get("refuri", "")
        if uri and not node.get("internal") and not re.match(r"[a-z]+:", uri):
            resolve_link(app, page, node)


def compare_version(app):
    newest = re.search(r"^## (\S+)", (TOP / "CHANGELOG.md").read_text(), re.M)[1]
    if newest != app.config.release:
        log.warning(f"CHANGELOG.md begins with {newest}, the Makefile has {app.config.release}")


def compare_pictures():
    for picture in TOP.glob("Documentation/*.svg"):
        for names in re.findall(r'class="file"[^>]*>([^<]+)<', picture.read_text()):
            for name in names.split():
                if not (TOP / name).exists():
                    log.warning(f"{picture.name}: there is no file {name}")


def begin(app):
    app.names = Names()
    app.shown_files = set()
    compare_version(app)
    compare_pictures()


def compare_files(app, env):
    for pattern in "*.rs", "rnbd_*/**/*.rs", "pure/**/*.rs", "kapi/**/*.rs":
        # "mod.rs" only declares modules.
        for file in set(TOP.glob(pattern)) - app.shown_files:
            if file.name != "mod.rs":
                log.warning(f"the tree in design.rst lacks {file.relative_to(TOP)}")


def setup(app):
    app.connect("builder-inited", begin)
    app.connect("doctree-read", check_literals)
    app.connect("env-check-consistency", compare_files)
    app.connect("doctree-resolved", resolve_links)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
