"""`makd doctor`: what of the environment is missing, and what slows runs down."""

import json
from pathlib import Path
from typing import Annotated

import typer

from makd_llm.cli_options import Debug
from makd_llm.errors import UserError


def doctor(
    ranks: Annotated[
        int | None,
        typer.Option(
            "--ranks", min=1, help="Processes of this machine; default: one per GPU, or 2."
        ),
    ] = None,
    runs: Annotated[Path, typer.Option("--runs", help="Where run folders will be.")] = Path("runs"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print all of it, with the numbers, as JSON.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Says what of this machine is missing or slow, and what to do about it. Ends with 2 where
    something is missing that every run needs.
    """
    from makd_llm.doctor import examine
    from makd_llm.report.doctor import as_json as everything
    from makd_llm.report.doctor import doctor_table
    from makd_llm.report.table import show

    findings = list(examine(ranks, runs))
    if as_json:
        print(json.dumps(everything(findings), indent=1))
    else:
        show(doctor_table(findings))
    lacking = [finding.name for finding in findings if finding.needed]
    if lacking:
        raise UserError(f"needed, and missing: {', '.join(lacking)}; the table says what to do")
