"""Which texts the quality rules drop, and by which rule."""

import math
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch

import numpy as np

from data_clean.damage import RAW_FEATURES, measure_raw
from data_clean.features import COLUMN, FEATURES, measure
from data_clean.keywords import automaton
from data_clean.normalise import normalise
from data_clean.presets import LONG, PRESETS, RAW_RULES, RULES, Rule
from data_clean.texts import Texts
from stage import UserError

LONG_NAME = "长文字数"  # in overrides: visible characters from which the rules for long texts apply
# Public corpora by the names of their files or folders.
KNOWN_SOURCES = (
    (r"wiki|baike|百科", "encyclopedia"),
    (r"medical|huatuo|cmedqa|医", "medical"),
    (r"poem|poetry|shici|诗词|唐诗|宋词", "poetry"),
    (r"(?<![a-z])(?:books?|novels?)(?![a-z])|chapters|小说|classical", "books"),
    (r"(?<![a-z])(?:m?c4|cci)(?![a-z])|wudao|skypile|map-?cc|webtext|common-?crawl|fineweb|wanjuan", "web"),
)
# Features that are numbers; the others are shares.
NUMBERS = ("characters", "content", "lines", "line_length", "entropy", "function_words")


class RuleSet:
    """The rules of a preset, with limits of the user's in place of some."""

    def __init__(
        self,
        preset: str = "general",
        overrides: Mapping[str, float] | None = None,
        block_words: Iterable[str] = (),
    ) -> None:
        """overrides: limits by rule name, and LONG_NAME. UserError for a preset, a name or a limit that cannot be."""
        check_preset(preset)
        column, overrides = list(PRESETS).index(preset), dict(overrides or {})
        self.long = overrides.get(LONG_NAME, LONG[column])
        self.limits = {rule.name: rule.limits[column] for rule in RAW_RULES + RULES}
        self.raw_names = [rule.name for rule in RAW_RULES]
        self.names = [rule.name for rule in RULES]
        for name, limit in overrides.items():
            check_limit(name, limit)
        self.limits |= {name: float(limit) for name, limit in overrides.items() if name != LONG_NAME}
        self.keywords = automaton(tuple(sorted({normalise(word) for word in block_words} - {""})))

    def raw_verdicts(self, texts: Texts) -> np.ndarray:
        """For raw texts the index in raw_names of the first rule that drops each, -1 for none: (n,) int8."""
        return self._first(
            RAW_RULES, measure_raw(texts), {name: i for i, name in enumerate(RAW_FEATURES)}, None
        )

    def measure(self, texts: Texts) -> np.ndarray:
        """The features that `verdicts` decides by, (n, len(FEATURES)) float32; blocked words are this set's."""
        return measure(texts, self.keywords)

    def verdicts(self, texts: Texts, features: np.ndarray | None = None) -> np.ndarray:
        """For normalised texts the index in names of the first rule that drops each, -1 for none: (n,) int8.

        features: what `measure` has given for these texts, if it is there already.
        """
        features = self.measure(texts) if features is None else features
        visible = np.rint(features[:, COLUMN["characters"]] * (1 - features[:, COLUMN["spaces"]]))
        return self._first(RULES, features, COLUMN, visible >= self.long)

    def _first(
        self,
        rules: tuple[Rule, ...],
        features: np.ndarray,
        columns: dict[str, int],
        is_long: np.ndarray | None,
    ) -> np.ndarray:
        result = np.full(len(features), -1, np.int8)
        for index, rule in reversed(list(enumerate(rules))):
            values, limit = features[:, columns[rule.feature]], np.float32(self.limits[rule.name])
            drops = values < limit if rule.drops == "below" else values > limit
            result[drops & is_long if rule.long_only else drops] = index
        return result


def descriptions() -> dict[str, str]:
    """What each rule drops, in words, for the report."""
    names = FEATURES | RAW_FEATURES
    return {
        rule.name: f"{names[rule.feature]}{'低于' if rule.drops == 'below' else '高于'}阈值（出处：{rule.source}）"
        for rule in RAW_RULES + RULES
    }


def check_preset(name: str) -> None:
    if name not in PRESETS:
        raise UserError(f"没有名为 {name} 的规则方案；可选：{'、'.join(PRESETS)}。")


def check_limit(name: str, limit: float) -> None:
    """Raise UserError for an unknown rule, or a limit that its feature cannot reach."""
    rules = {rule.name: rule for rule in RAW_RULES + RULES}
    if name != LONG_NAME and name not in rules:
        raise UserError(f"没有名为 {name} 的清洗规则；可选：{'、'.join([*rules, LONG_NAME])}。")
    is_number = name == LONG_NAME or rules[name].feature in NUMBERS
    if not (0 <= limit < math.inf if is_number else 0 <= limit <= 1):
        wanted = "不小于 0 的数" if is_number else "0 与 1 之间的比例"
        raise UserError(f"清洗规则 {name} 的阈值须是{wanted}，现在是 {limit}。")


def preset_of(source: str, chosen: Mapping[str, str] | None = None) -> str:
    """The preset for a source: the user's choice (name or pattern such as C4*), else by its name, else general."""
    for pattern, preset in (chosen or {}).items():
        if fnmatch(source, pattern):
            check_preset(preset)
            return preset
    known = (preset for pattern, preset in KNOWN_SOURCES if re.search(pattern, source, re.IGNORECASE))
    return next(known, "general")
