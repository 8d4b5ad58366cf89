"""The words of a config that name a piece of code, and the functions with which a plugin file adds
its own (docs/extend.md).

Built-in code is found by its word in the package that holds it: a policy loss in
`learner/algorithms/policy_loss.py`, an advantage estimator in `learner/algorithms/advantages.py`,
a weight transport in `cluster/weights/WORD.py`, a kind of reward in
`reward_service/sources/WORD.py`. Here is what a config has to know of each before anything heavy is
imported.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from cluster.contracts.errors import UserError

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLoss:
    """options: what it takes by keyword. per_completion: it has one ratio for a whole completion,
    so that all tokens of a completion need the same advantage and the same weight in the mean.
    function: a plugin's; None for a built-in one."""

    options: tuple[str, ...] = ()
    per_completion: bool = False
    function: Callable[..., Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvantageEstimator:
    """needs_values: it reads the values of a critic. needs_groups: it compares the completions of
    one prompt. per_token: tokens of one completion get different advantages. whitens: the method
    whitens its advantages over the step by definition. options, function: as in `PolicyLoss`."""

    needs_values: bool = False
    needs_groups: bool = False
    per_token: bool = False
    whitens: bool = False
    options: tuple[str, ...] = ()
    function: Callable[..., Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceLoss:
    """per_token: it takes means per token, not sums. reference: it takes log-ratios to the starting
    policy, not log-probabilities. options, function: as in `PolicyLoss`."""

    per_token: bool = False
    reference: bool = True
    options: tuple[str, ...] = ()
    function: Callable[..., Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardKind:
    """make: a plugin's `(**options) -> score`; None for a built-in kind. options: its keywords,
    required: those without a default."""

    options: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    make: Callable[..., Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightTransport:
    """publisher, receiver: a plugin's, see `weight_transport`; None for a built-in one."""

    publisher: Callable[..., Any] | None = None
    receiver: Callable[..., Any] | None = None


class Registry(Generic[T]):
    """Words of one config key. `origin` of a word: the plugin file it is from, "" if built in."""

    def __init__(self, what: str, built_in: Mapping[str, T]) -> None:
        self.what = what
        self._items: dict[str, T] = dict(built_in)
        self._origins: dict[str, str] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __contains__(self, word: str) -> bool:
        return word in self._items

    def __getitem__(self, word: str) -> T:
        """Raises UserError, naming the nearest and all known words, for one that is not known."""
        try:
            self.check(word)
        except ValueError as problem:
            raise UserError(
                str(problem), fix="name the plugin file that registers it in `plugins`"
            ) from None
        return self._items[word]

    def origin(self, word: str) -> str:
        return self._origins.get(word, "")

    def check(self, word: str) -> str:
        """`word`, for use as a validator. Raises ValueError as `[]` raises UserError."""
        if word not in self._items:
            near = difflib.get_close_matches(word, self._items, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            known = ", ".join(self._items)
            raise ValueError(f"there is no {self.what} of this name; {hint}known: {known}")
        return word

    def add(self, word: str, item: T) -> None:
        """Raises UserError for a word that is built in or taken by another plugin file."""
        if word in self._items and (not self.origin(word) or self.origin(word) != _loading):
            owner = self.origin(word) or "Accord itself"
            raise UserError(
                f"registers the {self.what} {word!r}, which {owner} has already",
                where=_loading,
                fix="give it another name",
            )
        self._items[word] = item
        self._origins[word] = _loading

    def add_built_in(self, word: str, item: T) -> None:
        """Raises UserError for a word that a plugin file has taken before."""
        if word in self._items:
            fix = "give it another name"
            what = f"registers the {self.what} {word!r}, which Accord itself has already"
            raise UserError(what, where=self.origin(word), fix=fix)
        self._items[word] = item

    def forget(self, origin: str) -> None:
        """Take out what a plugin file has registered."""
        for word in [word for word, file in self._origins.items() if file == origin]:
            del self._items[word], self._origins[word]


_CLIPS = ("clip_low", "clip_high")

POLICY_LOSSES = Registry(
    "policy loss",
    {
        "ppo": PolicyLoss(options=(*_CLIPS, "dual_clip")),
        "reinforce": PolicyLoss(),
        "cispo": PolicyLoss(options=_CLIPS),
        "gspo": PolicyLoss(options=_CLIPS, per_completion=True),
    },
)
ADVANTAGE_ESTIMATORS = Registry(
    "advantage estimator",
    {
        "gae": AdvantageEstimator(needs_values=True, per_token=True, whitens=True),
        "grpo": AdvantageEstimator(needs_groups=True, options=("scale_by_std",)),
        "rloo": AdvantageEstimator(needs_groups=True),
        "reinforce++": AdvantageEstimator(per_token=True, whitens=True),
        "reinforce-baseline": AdvantageEstimator(needs_groups=True, whitens=True),
    },
)
PREFERENCE_LOSSES = Registry(
    "preference loss",
    {
        "dpo": PreferenceLoss(options=("label_smoothing",)),
        "ipo": PreferenceLoss(),
        "kto": PreferenceLoss(options=("desirable_weight", "undesirable_weight")),
        "orpo": PreferenceLoss(per_token=True, reference=False),
        "simpo": PreferenceLoss(
            per_token=True, reference=False, options=("target_margin", "label_smoothing")
        ),
    },
)
REWARD_KINDS: Registry[RewardKind] = Registry("kind of reward", {})
"""The built-in words are those of the sections in `cluster.contracts.config.reward`."""

WEIGHT_TRANSPORTS = Registry(
    "weight transport",
    {
        "object_store": WeightTransport(),
        "disk": WeightTransport(),
        "collective": WeightTransport(),
        "shared_device": WeightTransport(),
    },
)
COMMANDS: Registry[Callable[..., Any]] = Registry("command", {})
REGISTRIES: tuple[Registry[Any], ...] = (
    POLICY_LOSSES,
    ADVANTAGE_ESTIMATORS,
    PREFERENCE_LOSSES,
    REWARD_KINDS,
    WEIGHT_TRANSPORTS,
    COMMANDS,
)

_loading = ""
"""The plugin file that is being loaded, to which what is registered belongs."""


def loading(file: str) -> None:
    """Says from which plugin file registrations come from now on ("": from none)."""
    global _loading
    _loading = file


def policy_loss(word: str, *, per_completion: bool = False) -> Callable[[F], F]:
    """`algorithm.loss = WORD`: a function `(logp, prox_logp, advantages, mask, *, OPTIONS)` that
    returns a `learner.algorithms.loss_terms.LossTerms` with one loss per token [B, T], zero where
    masked. OPTIONS named as keys of [algorithm] (`clip_low`, `clip_high`, `dual_clip`) get their
    values where they are set; others are set in `algorithm.loss_options`."""

    def register(function: F) -> F:
        options, _ = keywords(function)
        loss = PolicyLoss(options=options, per_completion=per_completion, function=function)
        POLICY_LOSSES.add(word, loss)
        return function

    return register


def preference_loss(
    word: str, *, per_token: bool = False, reference: bool = True
) -> Callable[[F], F]:
    """`loss = WORD` of `accord dpo`: a function `(chosen, rejected, *, OPTIONS)` that returns one
    loss per pair [N]. chosen, rejected [N]: of each completion log pi(y|x) - log ref(y|x), summed
    over its tokens; without the second term where not `reference`; divided by the number of tokens
    if `per_token`. `beta` and `label_smoothing` among OPTIONS get the values of these keys; others
    are set in `loss_options`."""

    def register(function: F) -> F:
        options, _ = keywords(function)
        loss = PreferenceLoss(
            per_token=per_token, reference=reference, options=options, function=function
        )
        PREFERENCE_LOSSES.add(word, loss)
        return function

    return register


def advantage_estimator(
    word: str,
    *,
    needs_values: bool = False,
    needs_groups: bool = False,
    per_token: bool = False,
    whitens: bool = False,
) -> Callable[[F], F]:
    """`algorithm.advantage = WORD`: a function `(inputs, *, OPTIONS)` of
    `learner.algorithms.advantages`: `AdvantageInputs` to `Advantages`. OPTIONS are set in
    `algorithm.advantage_options`; the other arguments are those of `AdvantageEstimator`."""

    def register(function: F) -> F:
        estimator = AdvantageEstimator(
            needs_values=needs_values,
            needs_groups=needs_groups,
            per_token=per_token,
            whitens=whitens,
            options=keywords(function)[0],
            function=function,
        )
        ADVANTAGE_ESTIMATORS.add(word, estimator)
        return function

    return register


def reward_kind(word: str) -> Callable[[F], F]:
    """`type = WORD` of a reward source: a function `(*, OPTIONS) -> score`, called once when the
    reward service starts. `score` takes a list of `reward_service.source.ScoreItem` and returns one
    finite number for each. OPTIONS are further keys of the source; all must be there by keyword."""

    def register(make: F) -> F:
        options, required = keywords(make)
        REWARD_KINDS.add(word, RewardKind(options=options, required=required, make=make))
        return make

    return register


def weight_transport(
    word: str, *, publisher: Callable[..., Any], receiver: Callable[..., Any]
) -> None:
    """`weights.transport = WORD`. publisher: `(PublisherOptions) -> Publisher`, called in the
    learner; receiver: `(device) -> Receiver`, called in each worker; both protocols are in
    `cluster.weights.transports`."""
    WEIGHT_TRANSPORTS.add(word, WeightTransport(publisher=publisher, receiver=receiver))


def command(function: F) -> F:
    """`accord FUNCTION`, with the function's arguments as typer reads them. The plugin file is
    named in the environment: `ACCORD_PLUGINS=file.py accord FUNCTION`."""
    COMMANDS.add(function.__name__.replace("_", "-"), function)
    return function


def keywords(function: Callable[..., Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(keyword-only parameters of `function`, those of them without a default)."""
    found = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return tuple(p.name for p in found), tuple(p.name for p in found if p.default is p.empty)
