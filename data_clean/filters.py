"""Named rules for texts that are not worth training on; each is one small function with its threshold."""

import re
import zlib
from collections.abc import Callable

from data_clean.normalise import comparison_key

SAMPLE = 20_000  # characters looked at for repetition: enough to judge, however long the document
CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f]")
# What wrong decoding leaves: the replacement character, its famous GBK forms, Latin-1 symbols.
MOJIBAKE = re.compile("\ufffd|锟斤拷|锟斤|烫烫烫|屯屯屯|[\u00a1-\u00b6\u00b8-\u00bf]")
SENTENCE = re.compile(r"[^。！？!?\n]+")
# What advertisements and page frames say, and texts about them hardly do.
BOILERPLATE = re.compile(
    "点击(?:这里|下载|领取|进入)|领取大?礼包|名额有限|先到先得|限时(?:优惠|特价|抢购)|特价促销|全场.折|天天有红包"
    "|加(?:我)?微信|免费咨询|扫一扫|关注(?:本站|公众号|我们)|扫码关注"
    "|返回顶部|上一页|下一页|友情链接|广告合作|联系我们|阅读全文|登录后(?:可|才能)?查看|浏览器(?:不支持|版本过低)"
    "|版权所有|翻版必究|备案号|https?://"
)
REPEATED_PHRASE = re.compile(r"(.{1,20}?)\1{3,}", re.DOTALL)


def too_many_controls(text: str) -> bool:
    """More than one character in twenty is a control character: binary data read as text."""
    return len(CONTROL.findall(text)) > len(text) / 20


def is_mojibake(text: str) -> bool:
    """More than one character in twenty-five is a trace of wrong decoding."""
    return sum(map(len, MOJIBAKE.findall(text))) > len(text) / 25


def is_short(text: str, min_chars: int) -> bool:
    """Fewer letters and digits than a single line of use; a five-character quatrain has twenty."""
    return len(text) < 20 * min_chars and len(comparison_key(text)) < min_chars


def lacks_letters(text: str) -> bool:
    """Under a third of the visible characters are letters or digits of any script."""
    sample = text[:SAMPLE]
    visible = len(sample) - sum(map(sample.count, " \n\t\u3000"))
    return len(comparison_key(sample)) < visible / 3


def is_boilerplate(text: str) -> bool:
    """More than half of the text lies in sentences that advertise or that frame a web page."""
    sample = text[:SAMPLE]
    if not BOILERPLATE.search(sample):
        return False
    sentences = SENTENCE.findall(sample)
    framing = sum(len(sentence) for sentence in sentences if BOILERPLATE.search(sentence))
    return framing > sum(map(len, sentences)) / 2


def is_repetitive(text: str) -> bool:
    """One character, phrase or line, said over and over, makes up most of the text."""
    sample = text[:SAMPLE]
    if may_repeat(sample):
        repeated = sum(match.end() - match.start() for match in REPEATED_PHRASE.finditer(sample))
        if repeated > len(sample) / 2:
            return True
    lines = [line.strip() for line in sample.split("\n") if line.strip()]
    return len(lines) >= 6 and sum(map(len, set(lines))) < sum(map(len, lines)) / 2


def may_repeat(sample: str) -> bool:
    """A cheap test that spares ordinary text the slow search for repeated phrases."""
    # Four times the same phrase over half of the text leaves at most 5/8 of the characters distinct.
    if len(set(sample)) > len(sample) * 5 / 8:
        return False
    data = sample.encode()
    return len(data) < 1000 or len(zlib.compress(data, 1)) < 0.4 * len(data)


Rule = Callable[[str], bool]
# On the raw text, because normalising removes the evidence.
RAW_RULES: dict[str, Rule] = {"控制字符过多": too_many_controls, "乱码": is_mojibake}


def clean_rules(min_chars: int) -> dict[str, Rule]:
    """The rules for normalised text, in the order in which they are tried."""
    return {
        "过短": lambda text: is_short(text, min_chars),
        "文字太少": lacks_letters,
        "广告或网页边框": is_boilerplate,
        "内容重复": is_repetitive,
    }


def broken_rule(text: str, rules: dict[str, Rule]) -> str | None:
    """The name of the first rule that drops the text."""
    return next((name for name, drops in rules.items() if drops(text)), None)
