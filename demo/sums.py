"""Documents with worked calculations: word problems, unit conversions, calendar questions."""

from __future__ import annotations

import datetime

from demo.chance import Chance
from demo.facts import HERE, ZODIAC, Fact, read_tsv
from demo.patterns import fill, load_frames

STEMS, BRANCHES = "甲乙丙丁戊己庚辛壬癸", "子丑寅卯辰巳午未申酉戌亥"
WEEKDAYS = "一二三四五六日"


def weekday(day: datetime.date) -> str:
    """Return the Chinese name of a day of the week."""
    return "星期" + WEEKDAYS[day.weekday()]


def date_text(day: datetime.date) -> str:
    """Return a date as 2024年2月10日."""
    return f"{day.year}年{day.month}月{day.day}日"


def sexagenary(year: int) -> str:
    """Return the name of a year in the sixty-year cycle (that of most of the year)."""
    return STEMS[(year - 4) % 10] + BRANCHES[(year - 4) % 12]


def is_leap(year: int) -> bool:
    """Tell whether a year of the Gregorian calendar is a leap year."""
    return year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)


class Calculator:
    """Writes documents whose numbers are computed on the spot."""

    def __init__(self, facts: list[Fact], chance: Chance) -> None:
        self.chance = chance
        self.frames = load_frames("sums.txt")
        self.names = load_frames("frames.txt")["name"]
        self.items = read_tsv(HERE / "patterns" / "items.tsv")
        self.units = [fact for fact in facts if fact.relation == "units.value"]

    def frame(self, section: str, slots: dict[str, str]) -> str:
        """Return a filled block of `sums.txt`."""
        return fill(self.chance.pick(self.chance.pick(self.frames[section])), slots)

    def problem(self) -> str:
        """Return one word problem with its solution."""
        chance = self.chance
        kind = chance.pick(["mul", "mul", "div", "div", "add", "sub"])
        if kind in ("mul", "div"):
            a, b = chance.between(2, 9), chance.between(2, 30)
            c = a * b
        else:
            a, b = chance.between(3, 90), chance.between(3, 90)
            c = a + b
        item = chance.pick(self.items)
        slots = {"a": str(a), "b": str(b), "c": str(c), "x": item["item"], "m": item["measure"]}
        slots["n"] = chance.pick(self.names)[0]
        question, solution = self.frame(kind, slots).split("||")
        return question + "\n" + chance.pick(["解：", "解答：", "分析：", "答："]) + solution

    def problems(self) -> tuple[str, str]:
        """Write a document of two to four word problems."""
        name = self.chance.pick(self.names)[0]
        parts = [self.frame("head", {"n": name})]
        parts += [self.problem() for _ in range(self.chance.between(2, 4))]
        if self.chance.hit(0.5):
            parts.append(self.frame("tail", {}))
        return "数学应用题", "\n".join(parts)

    def drill(self) -> tuple[str, str]:
        """Write a row of small sums, the kind asked for in the question sets."""
        chance = self.chance
        parts = [chance.pick(["口算练习。", "速算题。", "算一算，记一记。", "口算卡片：", "每日口算："])]
        for _ in range(chance.between(6, 14)):
            a, b = chance.between(2, 9), chance.between(2, 9)
            plus, times = f"{a}+{b}={a + b}", f"{a}×{b}={a * b}"
            parts.append(
                chance.pick(
                    [plus, times, f"{a}乘以{b}等于{a * b}", f"{a}加{b}等于{a + b}", f"{a * b}÷{b}={a}"]
                )
                + chance.pick(["；", "，", "。"])
            )
        return "口算", "".join(parts).rstrip("；，。") + "。"

    def conversion(self, fact: Fact) -> str:
        """Return one unit conversion worked through."""
        chance = self.chance
        unit = fact.fields()["unit"]
        source = fact.entity[1:]
        factor = int(fact.value[: -len(unit)])
        source = source[1:] if source.startswith("个") else source
        count = chance.between(2, 60)
        counter = "个" if fact.entity[1] == "个" else ""
        total = count * factor
        forward = [
            f"把{count}{counter}{source}换成{unit}：因为{fact.entity}等于{fact.value}，"
            f"所以{count}{counter}{source}等于{count}×{factor}={total}（{unit}）。",
            f"{fact.entity}是{fact.value}，{count}{counter}{source}就有{count}个{factor}{unit}，合{total}{unit}。",
            f"问：{count}{counter}{source}等于多少{unit}？答：{fact.entity}={fact.value}，"
            f"用{factor}乘以{count}，得{total}{unit}。",
        ]
        backward = [
            f"把{total}{unit}换成{source}：{total}÷{factor}={count}，所以是{count}{counter}{source}。",
            f"{total}{unit}里面有{count}个{factor}{unit}，而{fact.entity}等于{fact.value}，"
            f"所以合{count}{counter}{source}。",
        ]
        return chance.pick(forward if chance.hit(0.65) else backward)

    def conversions(self) -> tuple[str, str]:
        """Write a document of unit conversions."""
        chance = self.chance
        opening = ["单位换算练习。", "换算单位时要先想清楚进率。", "下面几道题练习单位换算。"]
        opening += ["生活中常要换算单位，请看例子。", f"{chance.pick(self.names)[0]}做了几道换算题。"]
        parts = [chance.pick(opening)]
        parts += [self.conversion(fact) for fact in chance.some(self.units, chance.between(3, 5))]
        return "单位换算", "".join(parts)

    def calendar_line(self) -> str:
        """Return one calendar computation."""
        chance = self.chance
        day = datetime.date(1950, 1, 1) + datetime.timedelta(days=chance.below(36500))
        later = chance.between(2, 60)
        end = day + datetime.timedelta(days=later)
        kind = chance.below(6)
        if kind == 0:
            return (
                f"{date_text(day)}是{weekday(day)}，再过{later}天是{date_text(end)}，那天是{weekday(end)}。"
            )
        if kind == 1:
            rest = later % 7
            reason = f"{later}除以7余{rest}" if rest else f"{later}正好是7的倍数"
            return f"今天是{weekday(day)}，{later}天以后是星期几？因为{reason}，所以是{weekday(end)}。"
        year = day.year
        if kind == 2:
            length, february = (366, 29) if is_leap(year) else (365, 28)
            word = "是闰年" if is_leap(year) else "是平年"
            return f"{year}年{word}，二月有{february}天，全年有{length}天。"
        if kind == 3:
            animal = ZODIAC[(year - 1984) % 12]
            return f"{year}年按干支纪年是{sexagenary(year)}年，生肖属{animal}，所以也叫{animal}年。"
        if kind == 4:
            other = year + 12
            return f"生肖十二年一轮回，{year}年是{ZODIAC[(year - 1984) % 12]}年，{other}年也是同一个生肖。"
        return f"{date_text(day)}到{date_text(end)}相隔{later}天，头一天是{weekday(day)}。"

    def calendar(self) -> tuple[str, str]:
        """Write a document of calendar computations."""
        chance = self.chance
        opening = [
            "历法小练习。",
            "看日历，算日子。",
            "关于年、月、日的计算：",
            "翻开万年历，可以看到下面的内容。",
        ]
        opening += [f"{chance.pick(self.names)[0]}学会了推算日期。", "推算星期几要用到余数。"]
        parts = [chance.pick(opening)] + [self.calendar_line() for _ in range(chance.between(3, 6))]
        return "历法计算", "".join(parts)

    def document(self) -> tuple[str, str]:
        """Write one document of a random kind."""
        kinds = [self.problems, self.problems, self.drill, self.conversions, self.calendar]
        return self.chance.pick(kinds)()
