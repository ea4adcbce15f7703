"""What to try first, and why: each rule looks at one trait of the models and may speak up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fusekit.inspection.result import Advice, Finding, Group
from fusekit.inspection.statistics import Floats, pairs

ORTHOGONAL = 0.15
"""Task vectors with a smaller cosine point in independent directions."""

ALIKE = 0.6
"""Task vectors with a greater cosine moved mostly the same way."""

OPPOSED = -0.15
"""Below this cosine one model undoes what the other did."""

SHARED_SUPPORT = 1.5
"""Supports that share this many times what chance would share compete for the same weights."""

TOP_CONFLICT = 0.25
"""Share of jointly large entries with opposite signs from which sign election has work to do."""

CONCENTRATED = 0.8
"""Share of the energy in the largest 5 % of entries from which trimming is nearly free."""

UNEVEN = 2.0
"""Ratio of task-vector norms from which the largest one dominates a plain sum."""

DOMINANT = 2.0
"""How many times its share of the whole a model's share of a layer must be to be named."""


@dataclass(frozen=True)
class Situation:
    """What the rules look at. `names` are the models that can be merged at all, as are the rows
    of the groups' statistics."""

    names: tuple[str, ...]
    whole: Group | None
    layers: Sequence[Group]
    findings: Sequence[Finding]
    has_base: bool

    def about(self, subject: str) -> list[Finding]:
        return [finding for finding in self.findings if finding.subject == subject]


Rule = Callable[[Situation], Iterator[Advice]]


def advise(situation: Situation) -> tuple[Advice, ...]:
    """The advice of every rule that applies, in the order in which to act on it."""
    return tuple(advice for rule in RULES for advice in rule(situation))


def leave_out(situation: Situation) -> Iterator[Advice]:
    """Models that a weight merge cannot use."""
    for finding in situation.about("disjoint") + situation.about("unrelated"):
        yield Advice(
            f"Leave out {finding.models[0]}, or name the base it really comes from: arithmetic on "
            "its weights would be noise. To use what it knows, distil or route instead.",
            (finding.text,),
        )
    for finding in situation.about("nonfinite"):
        yield Advice(f"Repair or replace {finding.models[0]} first.", (finding.text,))
    for finding in situation.about("duplicate_model"):
        yield Advice(
            f"Drop {finding.models[0]}: it only doubles the weight of {finding.models[1]}.",
            (finding.text,),
        )


def align_vocabularies(situation: Situation) -> Iterator[Advice]:
    """Different vocabularies need a common one."""
    found = situation.about("vocabulary") + situation.about("tokenizer")
    if found:
        yield Advice(
            "Set tokenizer_source: union, so that every token keeps its own embedding row.",
            tuple(finding.text for finding in found),
            {"tokenizer_source": "union"},
        )


def name_the_base(situation: Situation) -> Iterator[Advice]:
    """Without a base only the models' own directions are known."""
    if situation.has_base or situation.whole is None or len(situation.names) < 2:
        return
    cosine = float(np.nanmin(pairs(situation.whole.statistics.cosine)))
    method = "slerp" if len(situation.names) == 2 else "karcher"
    parameters = {"parameters": {"t": 0.5}} if method == "slerp" else {}
    reason = f"smallest cosine between models {cosine:.2f}"
    if cosine > 0.5:
        yield Advice(
            f"Give --base if there is a common ancestor: task vectors tell more than weights do. "
            f"Without one, {method} is the careful choice.",
            (reason, "the models are close enough to lie in one basin"),
            {"merge_method": method, **parameters},
        )
    else:
        yield Advice(
            "Do not average these weights: the models are not versions of one another. Distil, "
            "route, or align their neurons first.",
            (reason,),
        )


def choose_method(situation: Situation) -> Iterator[Advice]:
    """The method that fits the angles between the task vectors and their signs."""
    if not situation.has_base or situation.whole is None or len(situation.names) < 2:
        return
    known = situation.whole.statistics
    cosines = pairs(known.cosine)
    if np.isnan(cosines).all():
        return
    cosine = float(np.nanmean(cosines))
    agreement = float(np.nanmean(pairs(known.sign_agreement)))
    conflict = 1 - float(np.nanmean(pairs(known.top_sign_agreement)))
    overlap = float(np.nanmean(pairs(known.overlap)))
    contested = overlap >= SHARED_SUPPORT * 0.2 and conflict >= TOP_CONFLICT
    reasons = (
        f"mean cosine between task vectors {cosine:+.2f}",
        f"{agreement:.0%} sign agreement, {1 - conflict:.0%} among entries large in both",
        f"supports of the largest 20 % share {overlap:.0%} (chance: 20 %)",
    )
    if cosine < OPPOSED:
        yield Advice(
            "The models undo each other: adding their task vectors destroys much of the change. "
            "Try TIES, which lets the majority decide, and compare with keeping the models apart "
            "(routing).",
            reasons,
            {"merge_method": "ties", "parameters": {"density": 0.3, "lambda": 1.0}},
        )
    elif cosine > ALIKE:
        yield Advice(
            "Average rather than add: the task vectors point the same way, so their sum would "
            "overshoot. Model soup (linear) first; TIES has little to resolve.",
            reasons,
            {"merge_method": "linear", "parameters": {"weight": 1.0}},
        )
    elif contested:
        yield Advice(
            "Start with TIES, density 0.2-0.5: the models compete for the same weights and "
            "disagree on the sign there.",
            reasons,
            {"merge_method": "ties", "parameters": {"density": 0.3, "lambda": 1.0}},
        )
    elif abs(cosine) < ORTHOGONAL:
        yield Advice(
            "Start with task arithmetic, lambda 0.3-0.5: the task vectors are nearly orthogonal, "
            "so they add without much interference; TIES has little to resolve.",
            reasons,
            {"merge_method": "task_arithmetic", "parameters": {"lambda": 0.4}},
        )
    else:
        low, high = _scale_range(cosines)
        yield Advice(
            f"Start with task arithmetic, lambda {low:.2f}-{high:.2f}: the task vectors share part "
            "of their direction, so each needs less weight than alone.",
            reasons,
            {"merge_method": "task_arithmetic", "parameters": {"lambda": round(low, 2)}},
        )


def _scale_range(cosines: Floats) -> tuple[float, float]:
    """From plain averaging to the scale that keeps the sum as long as one task vector."""
    count = (1 + np.sqrt(1 + 8 * len(cosines))) / 2
    mean = max(float(np.nanmean(cosines)), 0.0)
    return float(1 / count), float(1 / np.sqrt(count + count * (count - 1) * mean))


def trim(situation: Situation) -> Iterator[Advice]:
    """Concentrated task vectors can be trimmed; diffuse ones cannot."""
    if not situation.has_base or situation.whole is None:
        return
    shares = situation.whole.statistics.energy_profile[:, 1]
    names = [
        name
        for name, share in zip(situation.names, shares, strict=True)
        if not np.isnan(share) and share >= CONCENTRATED
    ]
    if names:
        yield Advice(
            f"Trimming is nearly free for {', '.join(names)}: a density of 0.1-0.2 keeps what "
            "matters and leaves room for the others.",
            (
                f"the largest 5 % of entries hold {np.nanmin(shares[shares >= CONCENTRATED]):.0%} "
                "or more of the squared norm",
            ),
            {"merge_method": "ties", "parameters": {"density": 0.15, "lambda": 1.0}},
        )


def balance(situation: Situation) -> Iterator[Advice]:
    """Task vectors of very different length."""
    if not situation.has_base or situation.whole is None or len(situation.names) < 2:
        return
    norms = situation.whole.statistics.norms
    present = norms[norms > 0]
    if len(present) < 2 or present.max() / present.min() < UNEVEN:
        return
    largest = situation.names[int(np.argmax(norms))]
    weights = {
        name: round(float(present.min() / norm), 2)
        for name, norm in zip(situation.names, norms, strict=True)
        if norm > 0
    }
    shown = ", ".join(f"{name} {weight:g}" for name, weight in weights.items())
    yield Advice(
        f"{largest} moved {present.max() / present.min():.1f} times as far as the one that moved "
        f"least and would dominate: weigh the models inversely to their norms ({shown}).",
        ("relative norms " + ", ".join(f"{x:.3f}" for x in _relative(situation)),),
        {"models": [{"model": k, "parameters": {"weight": w}} for k, w in weights.items()]},
    )


def _relative(situation: Situation) -> list[float]:
    assert situation.whole is not None
    return [float(x) for x in situation.whole.statistics.relative_norms]


def dominant_layers(situation: Situation) -> Iterator[Advice]:
    """Runs of layers in which one model holds most of the change although it does not overall."""
    if not situation.has_base or situation.whole is None or len(situation.names) < 2:
        return
    overall = _shares(situation.whole)
    blocks = [group for group in situation.layers if group.name.rpartition(".")[2].isdecimal()]
    for model, name in enumerate(situation.names):
        threshold = max(0.5, min(0.9, DOMINANT * overall[model]))
        ruled = [group.name for group in blocks if _shares(group)[model] > threshold]
        if 0 < len(ruled) < len(blocks):
            where = _runs(ruled)
            yield Advice(
                f"Layers {where} are dominated by {name}: consider normalising the task vectors "
                "layer by layer (granularity: layer) or lowering its weight there.",
                (
                    f"{name} holds {overall[model]:.0%} of the squared change overall, but more "
                    "than half there",
                ),
            )


def _shares(group: Group) -> Floats:
    squares = np.square(group.statistics.norms)
    total = squares.sum()
    return np.asarray(squares / total if total > 0 else squares)


def _runs(names: Sequence[str]) -> str:
    """`20-27, 30` for the numbers of these layers; the stack is named where there are several."""
    stacks: dict[str, list[int]] = {}
    for name in names:
        stack, _, number = name.rpartition(".")
        stacks.setdefault(stack, []).append(int(number))
    parts = []
    for stack, numbers in stacks.items():
        runs: list[list[int]] = []
        for index in sorted(numbers):
            if runs and index == runs[-1][1] + 1:
                runs[-1][1] = index
            else:
                runs.append([index, index])
        text = ", ".join(f"{low}-{high}" if high > low else str(low) for low, high in runs)
        parts.append(f"{text} of {stack}" if len(stacks) > 1 else text)
    return "; ".join(parts)


def use_adapters(situation: Situation) -> Iterator[Advice]:
    """Task vectors of low rank merge better as adapters."""
    for finding in situation.about("lora"):
        yield Advice(
            f"Treat {finding.models[0]} as the adapter it came from: extracting it costs little, "
            "and low-rank updates can be merged in a common basis (KnOTS).",
            (finding.text,),
        )


RULES: tuple[Rule, ...] = (
    leave_out,
    align_vocabularies,
    name_the_base,
    choose_method,
    balance,
    dominant_layers,
    trim,
    use_adapters,
)
