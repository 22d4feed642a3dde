"""B4: the answer whose passed checks make it likeliest to be right, when the checks may be wrong as well."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from xpert.config import Config, option
from xpert.errors import BadInput
from xpert.experts.aggregators._answers import reader
from xpert.experts.aggregators._passing import RULES, pass_matrix, scored_groups
from xpert.experts.aggregators._prompting import says_yes, stated, with_last, without_thinking
from xpert.experts.aggregators._voting import Ballot, ComparingOptions, alone, asks_of, noted, sampled, vote
from xpert.protocols import Answer, Ask, Question, RoutableExpert, Verdict, Weigh, Weighed
from xpert.records import Message

__all__ = ["PLUGIN", "B4Aggregator", "B4Options"]

FORMS = (
    "{question}\n\nA proposed answer:\n{answer}\n\nIs this answer right? Answer Yes or No.",
    "Question:\n{question}\n\nSomebody answered:\n{answer}\n\nWould an examiner accept it? Answer Yes or No.",
    "{question}\n\nIs the following the correct reply?\n{answer}\n\nAnswer Yes or No.",
    "Check this reply to a task.\n\nTask:\n{question}\n\nReply:\n{answer}\n\nDoes it solve the task? Answer Yes or No.",
)


@dataclass(frozen=True)
class B4Options(ComparingOptions):
    samples: int = option(1, "replies of each expert; more than one are sampled", minimum=1)
    forms: int = option(3, "wordings in which each expert judges an answer", minimum=1, maximum=len(FORMS))
    rule: str = option("b4", "how the pass matrix is read; the others are baselines", choices=tuple(RULES))
    a_xy: float = option(1000.0, "prior: how many of the answers and checks are right", minimum=1e-6)
    b0: float = option(10_000.0, "prior: how seldom wrong answers pass wrong checks", minimum=1e-6)
    temperature: float = option(0.7, "of samples, where the question is asked greedily", minimum=1e-6)


class B4Aggregator:
    """Experts answer, and judge each other's answers; the pass matrix is read by the posterior of B4.

    A check is one expert and one form of "is this right?"; an answer passes it where Yes is likelier than No. Answers
    that pass the same checks are one group; the best group gives the reply: the answer most of its replies give, in the
    words of the heaviest expert. Where all replies give one answer, nothing is checked; where the checks do not fit the
    context, the replies vote.

    B4 is made for programs and tests; its priors (the release: a_xy = 1000, b0 of 10,000 to 1,000,000) suit many
    checks. Rules `max-pass` (most checks passed) and `codet` (sqrt(answers) x checks) are its baselines.

    Cost: `samples` replies per expert of the route; for each distinct answer, `forms` prompts per expert, each weighing
    two words. Source: https://arxiv.org/abs/2409.08692.
    """

    Options: ClassVar[type[Config]] = B4Options
    several: ClassVar[bool] = False
    cost: ClassVar[str] = "`samples` replies per expert; `forms` x experts likelihoods per distinct answer"
    source: ClassVar[str] = "B4, https://arxiv.org/abs/2409.08692"

    def __init__(self, options: B4Options, *, seed: int = 0, device: str = "auto") -> None:
        self.options = options

    def prepare(self, experts: Sequence[RoutableExpert]) -> None:
        """Needs nothing of the experts."""

    def answer(self, question: Question) -> Generator[Sequence[Ask | Weigh], Sequence[Answer | Weighed], Verdict]:
        options = self.options
        keys, asks = asks_of(question)
        sampling = sampled(question.sampling, options.temperature) if options.samples > 1 else question.sampling
        whose = [key for key in keys for _ in range(options.samples)]
        found = yield [Ask(ask.messages, ask.experts, sampling) for ask in asks for _ in range(options.samples)]
        replies = [reply for reply in found if isinstance(reply, Answer)]
        ballots = [Ballot(alone(key), reply) for key, reply in zip(whose, replies, strict=True)]
        read = reader(options.by, question, [reply.text for reply in replies])
        answers = [read(reply.text) for reply in replies]
        texts: dict[str, str] = {}
        for answer, reply in zip(answers, replies, strict=True):
            texts.setdefault(answer, without_thinking(reply.text))
        distinct = [answer for answer in texts if answer]
        if len(distinct) < 2:
            return vote(ballots, question, options.by)
        checks = [(key, form) for key in keys for form in FORMS[: options.forms]]
        try:
            weighed = yield [
                Weigh(_check(question, form, texts[answer]), alone(key), ("Yes", "No"))
                for answer in distinct
                for key, form in checks
            ]
        except BadInput:
            return noted(vote(ballots, question, options.by), "the checks do not fit the context")
        margins = [says_yes(one) for one in weighed if isinstance(one, Weighed)]
        of_answer = {
            answer: margins[place * len(checks) : (place + 1) * len(checks)] for place, answer in enumerate(distinct)
        }
        # A reply without an answer has nothing to be checked, and stays out of the matrix.
        rows = [place for place, answer in enumerate(answers) if answer]
        passes = pass_matrix([of_answer[answers[place]] for place in rows])
        scored = scored_groups(passes, options.rule, a_xy=options.a_xy, b0=options.b0)
        best = scored[0][0]
        verdict = vote([ballots[rows[row]] for row in best.rows], question, read.by)
        log = {
            **verdict.log,
            "rule": options.rule,
            "checks": [{"expert": key, "form": FORMS.index(form)} for key, form in checks],
            "answers": [
                {"answer": answer, "margins": of_answer[answer], "passed": sum(m > 0 for m in of_answer[answer])}
                for answer in distinct
            ],
            "groups": [
                {"replies": [rows[row] for row in group.rows], "passed": list(group.checks), "score": score}
                for group, score in scored
            ],
        }
        reason = (
            f"{options.rule}: passes {len(best.checks)} of {len(checks)} checks, as do {len(best.rows)} of "
            f"{len(replies)} replies"
        )
        return Verdict(verdict.text, verdict.experts, reason, verdict.finished, log)


def _check(question: Question, form: str, answer: str) -> tuple[Message, ...]:
    return with_last(question.messages, form.format(question=stated(question), answer=answer))


PLUGIN = B4Aggregator
