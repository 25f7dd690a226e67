"""Private data becomes placeholders: e-mail and IP addresses, numbers of mobile phones, identity and bank cards.

Precision comes first: a number counts only if its digits are as its standard prescribes (length, issuer, date,
check digit) and nothing around it makes it part of something else, such as a decimal, an amount, a code or a
link. Years, ISBNs, hotlines and landlines, version numbers and the addresses of local networks stay.
"""

import re
from collections import Counter
from collections.abc import Callable
from datetime import date
from ipaddress import IPv4Address
from typing import NamedTuple

import numpy as np
from numba import njit

from data_clean.texts import Texts

# Not within a longer word, number or link; several mobile numbers may be joined by slashes.
BEFORE = r"(?:(?<![\w@#&%+=])(?<![A-Za-z0-9][.\-])(?<![\w/]/)|(?<=1[3-9]\d{9}/))"
AFTER = r"(?![\w@=%]|[.\-]\w)"
# What makes a number something else, right before it or right behind it.
LABELS = re.compile(
    "(?:编号|单号|货号|型号|批号|条码|编码|代码|序号|文号|案号|专利号|注册号|许可证号?|订单|ISBN|ISSN|QQ号?|[¥￥$€])"
    r"(?:[：:]|为|是|\s)*$",
    re.IGNORECASE,
)
UNITS = re.compile(r"\s?(?:[元吨股万亿%％℃]|美元|欧元|人民币|公里|平方|立方|号(?!码))")
PHONE_WORDS = re.compile("(?:电话|手机|联系|热线|微信|咨询|致电|tel|phone|mobile)[^\n]{0,8}$", re.IGNORECASE)
CARD_WORDS = re.compile("(?:卡号|银行卡|信用卡|借记卡|储蓄卡|账号|帐号|账户)[^\n]{0,12}$")
CONTEXT = 24  # characters looked at before a number

# The first two digits of an identity number: provinces (GB/T 2260), Taiwan, Hong Kong, Macao.
AREAS = ((11, 16), (21, 24), (31, 38), (41, 47), (50, 55), (61, 66), (71, 72), (81, 84))
PROVINCES = {code for first, end in AREAS for code in range(first, end)}
WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)


class Kind(NamedTuple):
    """One kind of private data; `holds` has the last word on what the pattern finds."""

    name: str
    placeholder: str
    pattern: re.Pattern[str]
    holds: Callable[[re.Match[str]], bool]


def mask_private(texts: Texts) -> tuple[Texts, dict[str, int]]:
    """Private data replaced by placeholders such as <电话>; and how often each kind was, by its name.

    The same object comes back if there is nothing to replace.
    """
    where, changed = _find_candidates(*texts), []
    counts = Counter({kind.name: 0 for kind in KINDS})
    for index in np.flatnonzero(where).tolist():
        text = texts.text(index)
        masked = mask(text, counts)
        where[index] = masked != text
        if where[index]:
            changed.append(masked)
    return (texts.replace(where, changed) if changed else texts), dict(counts)


def mask(text: str, counts: Counter[str]) -> str:
    """One text masked; adds to the counts by kind."""
    for kind in KINDS:

        def replaced(match: re.Match[str], kind: Kind = kind) -> str:
            if not kind.holds(match):
                return match[0]
            counts[kind.name] += 1
            return kind.placeholder

        text = kind.pattern.sub(replaced, text)
    return text


def _before(match: re.Match[str]) -> str:
    return match.string[max(0, match.start() - CONTEXT) : match.start()]


def _is_labelled(match: re.Match[str]) -> bool:
    """Whether what stands beside it says that the number is something else."""
    return bool(LABELS.search(_before(match)) or UNITS.match(match.string, match.end()))


def is_identity_number(match: re.Match[str]) -> bool:
    """Province, date of birth and check digit (GB 11643-1999, ISO 7064 MOD 11-2) are right."""
    number = match[0]
    try:
        date(int(number[6:10]), int(number[10:12]), int(number[12:14]))
    except ValueError:
        return False
    check = sum(weight * int(digit) for weight, digit in zip(WEIGHTS, number, strict=False)) % 11
    return int(number[:2]) in PROVINCES and "10X98765432"[check] == number[17].upper()


def is_bank_card(match: re.Match[str]) -> bool:
    """Luhn's check digit (ISO/IEC 7812-1) is right, and it is UnionPay, grouped, or called a card or account."""
    digits = [int(char) for char in match[0] if char.isdigit()]
    doubled = [digit * 2 - 9 * (digit > 4) for digit in digits[-2::-2]]
    if (sum(digits[::-2]) + sum(doubled)) % 10 or _is_labelled(match):
        return False
    is_union_pay = digits[:2] == [6, 2]
    is_other = len(digits) == 16 and (match["separator"] or CARD_WORDS.search(_before(match)))
    return bool(is_union_pay or is_other)


def is_mobile(match: re.Match[str]) -> bool:
    """Not an amount or a code; groups with spaces between could be columns of a table, unless called a number."""
    if _is_labelled(match):
        return False
    return match["separator"] != " " or bool(PHONE_WORDS.search(_before(match)))


def is_public_address(match: re.Match[str]) -> bool:
    """Of a public network, and no version number: one part at least has three digits."""
    try:
        is_global = IPv4Address(match[0]).is_global
    except ValueError:
        return False
    return (
        is_global
        and max(map(len, match[0].split("."))) == 3
        and not match.string[: match.start()].endswith("版本")
    )


def _pattern(core: str) -> re.Pattern[str]:
    return re.compile(BEFORE + core + AFTER, re.ASCII)


KINDS = (
    Kind(
        "邮箱",
        "<邮箱>",
        re.compile(
            r"(?<![\w.%+\-])\w[\w.%+\-]{0,63}@(?:[A-Za-z0-9\-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![\w@]|-\w)",
            re.ASCII,
        ),
        lambda match: not match[0].startswith("git@"),  # the user of every code host
    ),
    Kind("身份证号", "<身份证号>", _pattern(r"[1-8]\d{5}(?:19|20)\d{9}[\dXx]"), is_identity_number),
    Kind(
        "银行卡号",
        "<银行卡号>",
        # UnionPay, Visa, MasterCard, JCB: ISO/IEC 7812 issuer numbers.
        _pattern(
            r"(?=62|4|5[1-5]|2[2-7]|35)"
            r"(?:\d{16,19}|\d{4}(?P<separator>[ -])\d{4}(?P=separator)\d{4}(?P=separator)\d{4}(?:(?P=separator)\d{3})?)"
        ),
        is_bank_card,
    ),
    Kind(
        "电话",
        "<电话>",
        # Number ranges of mobile networks in mainland China, as the ministry (工信部) has assigned them.
        _pattern(
            r"(?:(?:\+|00)?86[ -]?)?1(?:3\d|4[5-9]|5[0-35-9]|6[2567]|7[0-8]|8\d|9[0-35-9])"
            r"(?P<separator>[ -]?)\d{4}(?P=separator)\d{4}"
        ),
        is_mobile,
    ),
    Kind("IP地址", "<IP地址>", _pattern(r"\d{1,3}(?:\.\d{1,3}){3}"), is_public_address),
)


@njit(cache=True, nogil=True)
def _find_candidates(data, starts):
    """Texts with an @ in a word, 11 digits (spaces and hyphens between allowed), or four numbers with dots."""
    found = np.zeros(len(starts) - 1, np.bool_)
    for text in range(len(starts) - 1):
        digits, dots, is_digit = 0, 0, False
        for i in range(starts[text], starts[text + 1]):
            byte, was_digit = data[i], is_digit
            is_digit = 0x30 <= byte <= 0x39
            if is_digit:
                digits += 1
                if digits >= 11 or dots >= 3:
                    found[text] = True
                    break
            elif byte == 0x2E and was_digit:  # .
                dots += 1
                digits = 0
            elif not (was_digit and (byte == 0x20 or byte == 0x2D)):
                digits, dots = 0, 0
                if byte == 0x40:  # @
                    found[text] = True
                    break
    return found
