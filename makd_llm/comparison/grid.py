"""Which rows a comparison has, and which runs have to be made for them.

What rows share is made once, in runs of its own: the tuned teacher, and for each keep ratio the
factorized student with the measurements of both. Nothing of a cut is drawn at random, so it serves
every seed. A row's run is an ordinary run whose teacher is the shared one and whose factorized
student is linked.
"""

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from makd_llm.config import CompareConfig, RunConfig, validated
from makd_llm.config.presets import merged
from makd_llm.config.run import TrainConfig
from makd_llm.errors import UserError

TEACHER = "shared/teacher"


@dataclass(frozen=True)
class Item:
    """One run of the comparison.

    Attributes:
        place: its folder in the comparison's.
        kind: what its time is an example of: the same row with another seed takes as long.
        until: its last stage.
        needs: the place of the run that has to be there first; None: none.
    """

    place: str
    kind: str
    config: RunConfig
    until: str
    needs: str | None = None


@dataclass(frozen=True)
class Row:
    """One row of the table. keep_ratio, seed: None where they do not matter to it; item: None
    where it is a baseline.
    """

    name: str
    label: str
    baseline: str | None
    keep_ratio: float | None
    seed: int | None
    item: Item | None

    @property
    def words(self) -> str:
        """Its name, with what else there is of it."""
        keep = "" if self.keep_ratio is None else f"-keep{self.keep_ratio:g}"
        return self.name + keep + ("" if self.seed is None else f"-seed{self.seed}")


@dataclass(frozen=True)
class Grid:
    """All rows, in the order of the file, and the shared runs by their places."""

    config: CompareConfig
    base: RunConfig
    rows: tuple[Row, ...]
    shared: dict[str, Item] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.config.folder

    @property
    def runs(self) -> list[Item]:
        """Of the rows: one seed after the other, so that the first is soon whole."""
        items = [row.item for row in self.rows if row.item is not None]
        order = {seed: place for place, seed in enumerate(self.config.seeds)}
        return sorted(items, key=lambda item: order[item.config.seed])

    @property
    def lead(self) -> str:
        """The name of the lead baseline, as evaluations have it."""
        return f"lead-{self.base.evaluation.lead_k}"

    def with_needs(self, items: list[Item]) -> list[Item]:
        """The items in order, each with what it needs before it, everything once."""
        found: dict[str, Item] = {}
        for item in items:
            chain = [item]
            while chain[-1].needs is not None:
                chain.append(self.shared[chain[-1].needs])
            found |= {i.place: i for i in reversed(chain)} | found
        return list(found.values())

    def chosen(
        self,
        rows: Collection[str] | None,
        keep: Collection[float] | None,
        seeds: Collection[int] | None,
    ) -> "Grid":
        """A part of it; None: all. Raises UserError for what is not there."""
        config = self.config
        for option, asked, known in (
            ("--rows", rows, list(config.rows)),
            ("--keep", keep, list(config.keep_ratios)),
            ("--seeds", seeds, list(config.seeds)),
        ):
            for value in asked or ():
                if value not in known:
                    there = ", ".join(f"{k:g}" if isinstance(k, float) else str(k) for k in known)
                    raise UserError(f"{option} {value}: the comparison has {there}")
        kept = [
            row
            for row in self.rows
            if (rows is None or row.name in rows)
            and (keep is None or row.keep_ratio is None or row.keep_ratio in keep)
            and (seeds is None or row.seed is None or row.seed in seeds)
        ]
        return replace(self, rows=tuple(kept))

    def needed(self) -> list[Item]:
        """Every run that the rows need, in order. Baselines are measured in the shared runs."""
        cut = {row.keep_ratio for row in self.rows if row.keep_ratio is not None}
        if not cut and self.rows:
            cut = {self.config.keep_ratios[0]}
        shared = [self.shared[student_place(k)] for k in self.config.keep_ratios if k in cut]
        return self.with_needs([*shared, *self.runs])


def student_place(keep_ratio: float) -> str:
    """The folder of the shared run with the factorized student."""
    return f"shared/keep{keep_ratio:g}"


def build_grid(config: CompareConfig) -> Grid:
    """All rows and runs of a comparison. Raises UserError where a row's config is wrong, or its
    rows would differ in more than what is learnt.
    """
    _check_common(config)
    base = _run_config(config, {}, "run")
    shared = _shared(config, base)
    rows: list[Row] = []
    for name, asked in config.rows.items():
        label = asked.label or name
        if asked.baseline == "lead" and name != f"lead-{base.evaluation.lead_k}":
            raise UserError(
                f"rows.{name}: run.evaluation.lead_k is {base.evaluation.lead_k}; call the row "
                f"lead-{base.evaluation.lead_k}, or change that"
            )
        if asked.baseline == "factorized":
            rows += [Row(name, label, "factorized", k, None, None) for k in config.keep_ratios]
        elif asked.baseline is not None:
            rows.append(Row(name, label, asked.baseline, None, None, None))
        else:
            for keep in config.keep_ratios:
                rows += [_learning(config, base, name, keep, seed) for seed in config.seeds]
    _check_equal(rows)
    return Grid(config, base, tuple(rows), shared)


def _learning(config: CompareConfig, base: RunConfig, name: str, keep: float, seed: int) -> Row:
    asked = config.rows[name]
    row = Row(name, asked.label or name, None, keep, seed, None)
    place = f"rows/{row.words}"
    above = {
        **_taught(config, base),
        "run_dir": str(config.folder / place),
        "seed": seed,
        "student": {"keep_ratio": keep},
        "distil": asked.distil,
    }
    own = _run_config(config, above, f"rows.{name}")
    return replace(row, item=Item(place, name, own, "evaluate", student_place(keep)))


def _shared(config: CompareConfig, base: RunConfig) -> dict[str, Item]:
    """The tuned teacher, and a factorized student for each keep ratio."""
    found: dict[str, Item] = {}
    # These learn nothing that needs a teacher, whatever it is.
    nothing = {"distil": {"preset": "finetune"}}
    if base.sft.enabled:
        own = {**nothing, "run_dir": str(config.folder / TEACHER)}
        found[TEACHER] = Item(TEACHER, "teacher", _run_config(config, own, "run"), "sft")
    for keep in config.keep_ratios:
        place = student_place(keep)
        own = {
            **nothing,
            **_taught(config, base),
            "run_dir": str(config.folder / place),
            "student": {"keep_ratio": keep},
        }
        needs = TEACHER if base.sft.enabled else None
        item = Item(place, "factorized", _run_config(config, own, "run"), "baselines", needs)
        found[place] = item
    return found


def _taught(config: CompareConfig, base: RunConfig) -> dict[str, Any]:
    """The teacher of all runs but the one that tunes it."""
    if not base.sft.enabled:
        return {}
    tuned = str(config.folder / TEACHER / "teacher")
    return {"teacher": {"model": tuned}, "sft": {"enabled": False}}


def _run_config(config: CompareConfig, above: dict[str, Any], where: str) -> RunConfig:
    try:
        return validated(RunConfig, merged(config.run, above), where)
    except UserError as error:
        said = str(error)
        raise UserError(said if said.startswith(where) else f"{where}: {said}") from None


def _check_common(config: CompareConfig) -> None:
    """`run` says what all rows have, and nothing of what a row is."""
    # What is no section at all is refused with the rest of the config.
    sections = {
        name: found if isinstance(found := config.run.get(name), dict) else {}
        for name in ("distil", "student")
    }
    for key in ("preset", "objectives"):
        if key in sections["distil"]:
            raise UserError(f"run.distil.{key}: rows differ in it; give it to each of them")
    if "run_dir" in config.run:
        raise UserError("run.run_dir: a comparison has `folder`; take run_dir out")
    if sections["student"].get("keep_ratio") is not None:
        raise UserError("run.student.keep_ratio: a comparison has `keep_ratios`; take it out")


def _check_equal(rows: list[Row]) -> None:
    """All rows take as many steps of as many records, and log all of them."""
    first: TrainConfig | None = None
    for row in rows:
        if row.item is None:
            continue
        train = row.item.config.distil.train
        first = first or train
        for key in ("steps", "batch_size"):
            if getattr(train, key) != getattr(first, key):
                raise UserError(
                    f"rows.{row.name}.distil.train.{key} is {getattr(train, key)}, other rows have "
                    f"{getattr(first, key)}; a comparison is at equal tokens, so set it in run"
                )
        if train.log_every != 1:
            raise UserError(
                f"rows.{row.name}.distil.train.log_every is {train.log_every}; every step's tokens "
                "are compared, so it has to be 1"
            )
