"""Different texts that careless methods take for the same: filled templates, other scripts, hardly any text."""

import re
from functools import lru_cache
from pathlib import Path

import numpy as np

from bench.background import Background

TEMPLATES = Path(__file__).with_name("templates.txt")
SLOT = re.compile(r"\{(\D+)\d+\}")
SURNAMES = (
    "王李张刘陈杨赵黄周吴徐孙胡朱高林何郭马罗梁宋郑谢韩唐冯于董萧程曹袁邓许傅沈曾彭吕苏卢蒋蔡贾丁魏薛叶阎"
)
GIVEN = (
    "伟芳娜秀敏静丽强磊军洋勇艳杰娟涛明超兰霞平刚桂英华玉萍红鹏斌宇浩凯嘉俊志建国海燕梅春雪晨曦文博思远子涵雨"
)
PLACES = (
    "安保滨沧昌长成赤崇大丹德东峨恩丰抚阜甘广贵海汉合衡鹤洪湖淮黄吉济佳江焦金晋荆九开昆兰乐连凉辽林临柳六龙娄泸吕"
    "绵牡南宁攀盘萍莆齐千钦青清庆曲泉日三汕商韶绍石双朔松苏台太泰唐天铁通渭温乌梧西咸湘新邢徐许宣烟盐阳宜银鹰营永榆玉"
)
TRADES = "宏盛泰和瑞丰恒信天正华中联创鼎新世纪源通达康力方圆博远景科讯飞跃腾龙凤鸣鹿原石松柏青云白水红日绿洲蓝海金桥"

# Writing system -> what stands between words, beginnings and ends of syllables.
SCRIPTS: dict[str, tuple[str, str, str]] = {
    "俄文": (
        " ",
        "б в г д ж з к л м н п р с т ф х ц ч ш пр ст кр гл",
        "а е и о у ы я ю ой ать ий ень",
    ),
    "希腊文": (
        " ",
        "β γ δ ζ θ κ λ μ ν ξ π ρ σ τ φ χ ψ στ πρ",
        "α ε η ι ο υ ω ά έ ή ί ό ύ ώ ου αι ος",
    ),
    "泰文": (
        "",
        "ก ข ค ง จ ช ด ต ถ ท น บ ป ผ พ ม ย ร ล ว ส ห อ เก แม โล ไป",
        "ะ า ิน ี ึก ื ุ ู ้า ่อ ำ ัน",
    ),
    "印地文": (
        " ",
        "क ख ग घ च ज ट ड त द न प ब भ म य र ल व श स ह प्र स्त",
        "ा ि ी ु ू े ै ो ौ ं ाँ र",
    ),
    "阿拉伯文": (
        " ",
        "ب ت ث ج ح خ د ذ ر ز س ش ص ط ع غ ف ق ك ل م ن ه ال",
        "ا و ي ة ى ان ين ون ِ َ",
    ),
    "日文": (
        "",
        "か き く け こ さ し す た ち つ な に の は ま み も や よ ら り る れ 学 国 語 時 食 見 行 山 駅 カ タ メ",
        "い う ん を が で と っ て だ 人 日",
    ),
    "韩文": (
        " ",
        "가 나 다 라 마 바 사 아 자 하 고 노 도 로 모 보 소 오 조 호 기 니 디 리 미",
        "는 을 에 의 한 서 지 인 들 과 요 습 했",
    ),
    "英文": (
        " ",
        "b c d f g h j k l m n p r s t v w th ch sh st tr pl",
        "a e i o u ea ou ing er on and ent",
    ),
}
EMOJI = [chr(code) for code in (*range(0x1F600, 0x1F64F), *range(0x1F300, 0x1F320), *range(0x1F400, 0x1F43E))]
SIGNS = list("，。！？；：、…—～·《》〈〉（）【】“”‘’!?.,;:-+*/=#&@$%^|~")


def filled_template(name: str, random: np.random.Generator) -> str:
    """A template with new names and numbers."""
    values: dict[str, str] = {}

    def value(slot: re.Match[str]) -> str:
        if slot[0] not in values:
            values[slot[0]] = _slot_value(slot[1], random)
        return values[slot[0]]

    return SLOT.sub(value, templates()[name])


def in_script(name: str, random: np.random.Generator) -> str:
    """Words of random syllables in a writing system."""
    separator, beginnings, ends = SCRIPTS[name]
    count = int(random.integers(60, 300))
    first, last = random.choice(beginnings.split(), count), random.choice(ends.split(), count)
    closes_word = random.random(count) < 0.4
    return "".join(
        a + b + (separator if closes else "") for a, b, closes in zip(first, last, closes_word, strict=True)
    ).strip()


def only_from(letters: list[str], random: np.random.Generator) -> str:
    """Five to sixty of these characters."""
    return "".join(random.choice(letters, int(random.integers(5, 60))))


def tiny_text(text: str, rate: float, random: np.random.Generator, background: Background) -> str:
    """A line of 2 to 29 characters; the first two arguments only make it a `Change`."""
    codes = background.passage(random, int(random.integers(2, 30)))
    return codes.tobytes().decode("utf-32-le")


@lru_cache(maxsize=1)
def templates() -> dict[str, str]:
    """Name -> text with slots, from templates.txt."""
    blocks = re.split(r"^\[(.+)\]\n", TEMPLATES.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {name: text.strip() for name, text in zip(blocks[::2], blocks[1::2], strict=True)}


def _slot_value(kind: str, random: np.random.Generator) -> str:
    def some(letters: str, low: int, high: int) -> str:
        return "".join(random.choice(list(letters), int(random.integers(low, high + 1))))

    match kind:
        case "地":
            return some(PLACES, 2, 3)
        case "人":
            return some(SURNAMES, 1, 1) + some(GIVEN, 1, 2)
        case "名":
            return some(TRADES, 3, 5)
        case "数":
            return str(random.integers(10, 10 ** int(random.integers(2, 7))))
        case "几":
            return str(random.integers(1, 41))
        case "小":
            return f"{random.integers(1, 400)}.{random.integers(1, 999)}"
        case "年":
            return str(random.integers(1900, 2025))
        case "日":
            return f"{random.integers(1, 13)}月{random.integers(1, 29)}日"
    raise ValueError(f"templates.txt: unknown slot {kind}")
