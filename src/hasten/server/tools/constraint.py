"""Constraints of answers that a model reasons before: the grammar lets it, and holds for what follows."""

from collections.abc import Mapping, Sequence
from typing import Any

from hasten.engine.text import AddedToken
from hasten.server.tools.harmony import HarmonyGrammar
from hasten.server.tools.reasoning import HARMONY, ReasoningForm, Stage
from hasten.server.tools.rules import answer_rules, mark_rule


def after_reasoning(
    constraint: Mapping[str, Any],
    form: ReasoningForm,
    stage: Stage,
    tokens: Mapping[str, AddedToken],
    end_tokens: Sequence[int],
) -> str:
    """The grammar of reasoning and an answer that keeps to one constraint under SamplingParams' name."""
    ((kind, value),) = constraint.items()
    rules = answer_rules(kind, value)
    if form is HARMONY:
        return HarmonyGrammar(tokens, end_tokens).answer(rules)
    closing = mark_rule(form.closing, tokens)
    if form.closing in tokens:
        excluded = ",".join(map(str, sorted({tokens[form.closing].number, *end_tokens})))
        reasoning = [f"reasoning: <[^{excluded}]>* {closing}"]
    else:
        reasoning = [f"reasoning[lazy]: /(?s:.*)/ {closing}"]
    begin = f"({mark_rule(form.opening, tokens)} reasoning GAP?)?" if stage is Stage.AHEAD else "reasoning GAP?"
    return "\n".join([f"start: {begin} answer", rules, *reasoning, r"GAP: /[ \n]{1,4}/"])
