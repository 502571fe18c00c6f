"""`makd report`: runs, or a comparison, as one HTML page."""

import json
from pathlib import Path
from typing import Annotated

import typer

from makd_llm.cli_options import Debug
from makd_llm.errors import UserError


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Run folders, or the folder of a comparison."),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The page; default: report.html in the folder, or here."),
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", min=0, help="Documents shown with their summaries.")
    ] = 40,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the numbers, and write no page.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Writes one self-contained HTML page about runs, finished or not, or about a comparison."""
    from makd_llm.report.numbers import numbers
    from makd_llm.report.page import read, write

    subject = read(folders)
    if as_json:
        found = numbers(subject.runs, subject.comparison)
        print(json.dumps(found, indent=1, ensure_ascii=False))
        return
    target = out or (folders[0] if len(folders) == 1 else Path()) / "report.html"
    if target.is_dir():
        raise UserError(f"--out {target}: a folder; give the page's name, as {target}/report.html")
    try:
        write(subject, target, samples=samples)
    except FileNotFoundError:
        raise UserError(f"--out {target}: there is no folder {target.parent}; make it") from None
    print(f"written: {target} ({target.stat().st_size / 1e3:,.0f} kB)")
