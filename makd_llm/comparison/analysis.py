"""The text under the table: every number in it is read from the table, and nothing else is.

A difference counts where its p, adjusted for all tests of one metric against the same row at one
keep ratio (Benjamini and Hochberg), is below 0.05. Of the others it is said that none is shown.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from makd_llm.evaluation.against import PER_TOKEN
from makd_llm.evaluation.significance import adjusted, p_in_words

LEVEL = 0.05
METRIC = "rougeLsum"
WORDS = {
    METRIC: ("ROUGE-Lsum", "{:+.2f}"),
    PER_TOKEN: ("nats per token, less is better", "{:+.3f}"),
}
FULL = "makd"
ORDERS = {
    "Of the levels by themselves": ("makd-matrix", "makd-layer", "makd-model"),
    "Of the hierarchies": (FULL, "makd-reverse", "makd-flat"),
}
Group = Mapping[str, Any]
Groups = Mapping[str, Group]


def analysis_of(found: Mapping[str, Any]) -> str:
    """A paragraph for each keep ratio and one of what is missing, with a blank line between, from
    `groups`, `rows` and `equal_tokens` of comparison.json alone.
    """
    keeps = dict.fromkeys(g["keep_ratio"] for g in found["groups"] if g["keep_ratio"] is not None)
    said = [_of_keep(found, keep) for keep in keeps]
    said = [paragraph for paragraph in said if paragraph] or ["Nothing has been measured yet."]
    return "\n\n".join(paragraph for paragraph in [*said, _caveats(found)] if paragraph)


def _of_keep(found: Mapping[str, Any], keep: float) -> str:
    there = {
        group["name"]: group
        for group in found["groups"]
        if group["keep_ratio"] in (None, keep) and group[METRIC] is not None
    }
    learning = {name: group for name, group in there.items() if group["tokens"] is not None}
    if not learning:
        return ""
    references = [name for name in there if any(name in g["against"] for g in learning.values())]
    sentences = [
        _scale(there, learning, keep),
        _best(learning),
        *(_against(learning, name, metric) for name in references for metric in WORDS),
        *(_full_method(learning, name) for name in references if FULL in learning and name != FULL),
        *(_order(learning, names, words) for words, names in ORDERS.items()),
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def _scale(there: Groups, learning: Groups, keep: float) -> str:
    """What there is to win: from a student that has learnt nothing to the teacher."""
    sets = [set(group["seeds"]) for group in learning.values()]
    seeds = sorted(set().union(*sets))
    tokens = max(group["tokens"] for group in learning.values())
    start = (
        f"At keep ratio {keep:g} ({tokens:,.0f} tokens, seed{'s' if len(seeds) > 1 else ''} "
        f"{_listed([str(seed) for seed in seeds])}"
        f"{'' if all(one == sets[0] for one in sets) else ', not all of them for every row'})"
    )
    lines = [_with_rouge(group) for name, group in there.items() if name not in learning]
    scale = f"the scale is {_listed(lines)} ROUGE-Lsum, and " if lines else ""
    return f"{start}, {scale}{_counted(len(learning), 'row')} learnt."


def _best(learning: Groups) -> str:
    most = max(learning.values(), key=lambda group: group[METRIC]["value"])
    least = min(learning.values(), key=lambda group: group["perplexity"])
    value, share = most[METRIC], (most["share_of_teacher"] or {}).get(METRIC)
    kept = f", {share:.1%} of the teacher's" if share else ""
    return (
        f"The highest ROUGE-Lsum has {most['label']} ({value['value']:.2f}, {value['low']:.2f} to "
        f"{value['high']:.2f}{kept}), the lowest perplexity {least['label']} "
        f"({least['perplexity']:.2f})."
    )


def _tests(
    learning: Groups, reference: str, metric: str = METRIC
) -> dict[str, tuple[float, float]]:
    """name -> its difference from the reference, and the adjusted p."""
    tests = {
        name: group["against"][reference][metric]
        for name, group in learning.items()
        if metric in group["against"].get(reference, {})
    }
    p_values = adjusted([test["p"] for test in tests.values()])
    return {n: (t["difference"], p) for (n, t), p in zip(tests.items(), p_values, strict=True)}


def _against(learning: Groups, reference: str, metric: str) -> str:
    """Which rows differ from the reference once the number of tests is accounted for."""
    tests = _tests(learning, reference, metric)
    if not tests:
        return ""
    words, form = WORDS[metric]
    sides = {
        "above": [n for n, (d, p) in tests.items() if p < LEVEL and d > 0],
        "below": [n for n, (d, p) in tests.items() if p < LEVEL and d < 0],
    }
    said = []
    for side, names in sides.items():
        those = [f"{learning[name]['label']} ({form.format(tests[name][0])})" for name in names]
        if those:
            said.append(f"{_listed(those)} {'is' if len(those) == 1 else 'are'} {side} it")
    rest = len(tests) - sum(len(names) for names in sides.values())
    if rest:
        others = f"for the other {_counted(rest, 'row') if rest > 1 else 'row'} " if said else ""
        said.append(f"{others}no difference is shown")
    return (
        f"Against {_label(learning, reference)} in {words} ({_counted(len(tests), 'test')}, "
        f"adjusted), {_listed(said)}."
    )


def _full_method(learning: Groups, reference: str) -> str:
    """Whether the full method is worth more than the reference."""
    full, tests = learning[FULL], _tests(learning, reference)
    who = f"{full['label']} against {_label(learning, reference)}"
    if FULL not in tests:
        return f"{who}: not tested, for want of the same seeds of both."
    difference, p = tests[FULL]
    found = full["against"][reference][METRIC]
    said = [
        f"ROUGE-Lsum {difference:+.2f} ({found['low']:+.2f} to {found['high']:+.2f}), "
        f"{_verdict(difference, p)}"
    ]
    other = learning.get(reference)
    perplexity = f"perplexity {full['perplexity']:.2f}" + (
        f" against {other['perplexity']:.2f}" if other else ""
    )
    if PER_TOKEN in full["against"][reference]:
        nats, p_of_it = _tests(learning, reference, PER_TOKEN)[FULL]
        perplexity += f", {_verdict(-nats, p_of_it)}"
    said.append(perplexity)
    if other and other["seconds"]:
        said.append(f"{full['seconds'] / other['seconds']:.2f} times the seconds")
    return f"{who}: {'; '.join(said)}."


def _verdict(gain: float, p: float) -> str:
    """Of a difference, of which more is better."""
    if p >= LEVEL:
        return f"no difference is shown (adjusted {p_in_words(p)})"
    return f"{'better' if gain > 0 else 'worse'} (adjusted {p_in_words(p)})"


def _order(learning: Groups, names: Sequence[str], words: str) -> str:
    """Some rows from the most ROUGE-Lsum down."""
    those = sorted(
        (learning[name] for name in names if name in learning),
        key=lambda group: -group[METRIC]["value"],
    )
    if len(those) < 2:
        return ""
    lines = [f"{_with_rouge(group)} (perplexity {group['perplexity']:.2f})" for group in those]
    return f"{words}, in order of ROUGE-Lsum, not tested against each other: {_listed(lines)}."


def _caveats(found: Mapping[str, Any]) -> str:
    """What keeps the table from being whole, or fair."""
    said = []
    if found["equal_tokens"]["equal"] is False:
        said.append("The rows did not see the same tokens, so they cannot be compared.")
    rows = _counted(len(found["rows"]), "row")
    failed, waiting = (
        sum(row["state"] == state for row in found["rows"]) for state in ("failed", "waiting")
    )
    if failed:
        said.append(f"{failed} of {rows} failed.")
    if waiting:
        said.append(f"{waiting} of {rows} {'is' if waiting == 1 else 'are'} not made yet.")
    return " ".join(said)


def _label(learning: Groups, name: str) -> str:
    return str(learning[name]["label"]) if name in learning else name


def _with_rouge(group: Group) -> str:
    return f"{group['label']} {group[METRIC]['value']:.2f}"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _listed(words: Sequence[str]) -> str:
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"
