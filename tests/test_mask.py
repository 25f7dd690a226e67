"""Private data: what is masked, and what only looks like it."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_clean.mask import KINDS, WEIGHTS, mask_private
from data_clean.texts import from_strings


def masked(text):
    """The text masked, and the kinds found."""
    texts, counts = mask_private(from_strings([text]))
    return texts.texts()[0], {kind: count for kind, count in counts.items() if count}


@pytest.mark.parametrize(
    ("text", "expected", "kinds"),
    [
        ("电话13812345678，邮箱 zhang.san@163.com。", "电话<电话>，邮箱 <邮箱>。", {"电话": 1, "邮箱": 1}),
        ("致电+86 138-1234-5678或8613912345678", "致电<电话>或<电话>", {"电话": 2}),
        ("手机：138 1234 5678", "手机：<电话>", {"电话": 1}),
        ("张三/13812345678/15912345678", "张三/<电话>/<电话>", {"电话": 2}),
        ("联系13812345678张先生", "联系<电话>张先生", {"电话": 1}),
        ("王五,11010519491231002X,北京", "王五,<身份证号>,北京", {"身份证号": 1}),
        ("卡号6222021234567890128", "卡号<银行卡号>", {"银行卡号": 1}),
        ("6222 0212 3456 7890 128", "<银行卡号>", {"银行卡号": 1}),
        ("信用卡4111111111111111", "信用卡<银行卡号>", {"银行卡号": 1}),
        ("来自123.125.114.144的访问", "来自<IP地址>的访问", {"IP地址": 1}),
        ("a_b+c@mail.example.com.cn、x@y.org", "<邮箱>、<邮箱>", {"邮箱": 2}),
    ],
)
def test_private_data_is_masked(text, expected, kinds):
    assert masked(text) == (expected, kinds)


@pytest.mark.parametrize(
    "text",
    [
        "1949年10月1日，2008年8月8日20:08:08，时间戳1700000000000。",
        "ISBN 978-7-302-51121-2，ISBN9787302511212，书号13812345678号",
        "圆周率3.14159265358979323846264338，比值0.13812345678",
        "拨打12345、400-820-8820、4008208820、010-12345678或0571-88888888，也可拨13800，不要拨1381234567。",
        "全年收入15234567890元，共13812345678吨，合￥13812345678。",
        "编号：13812345678；订单号为6222021234567890128；QQ13812345678；型号A13812345678",
        "http://example.com/13812345678.html 和 ?tel=13812345678&x=1",
        "2010 2011 2012 1380 1234 5678，共150 2000 3000，138 2010 2011",
        "身份证110105194912310021的校验码不对，11010519491331002X的月份不对，99010519491231002X没有这个省",
        "卡号6222021234567890127的校验码不对，数字4111111111111111没有说是卡",
        "192.168.1.1、127.0.0.1、10.0.0.255是内网，版本10.0.190.41，第1.2.3.4节，v100.200.30.4，256.300.1.2，1.123.125.114.144",
        "微博@人民日报，价格@10，a @ b.com，@x，git@github.com:a/b.git",
    ],
)
def test_what_only_looks_private_stays(text):
    texts = from_strings([text])
    same, counts = mask_private(texts)
    assert same is texts and not any(counts.values()), same.texts()


def test_identity_and_card_numbers_with_any_other_check_digit_stay():
    rng = random.Random(0)
    for _ in range(50):
        birth = f"{rng.randrange(1930, 2015)}{rng.randrange(1, 13):02}{rng.randrange(1, 29):02}"
        body = f"{rng.choice([11, 31, 44, 51])}0105{birth}{rng.randrange(1000):03}"
        check = "10X98765432"[sum(w * int(d) for w, d in zip(WEIGHTS, body, strict=True)) % 11]
        found = [last for last in "0123456789X" if masked(f"号码{body}{last}。")[1].get("身份证号")]
        assert found == [check]
        card = "622848" + "".join(rng.choices("0123456789", k=12))
        found = [last for last in "0123456789" if masked(f"卡{card}{last}。")[1]]
        digits = [int(d) for d in card + found[0]]
        total = sum(digits[::-2]) + sum(sum(map(int, str(2 * d))) for d in digits[-2::-2])
        assert len(found) == 1 and total % 10 == 0


PIECES = [*"中 -.1@/", "13812345678", "a@b.cn", "123.125.114.144", "11010519491231002X"]
TEXTS = st.lists(
    st.one_of(st.sampled_from(PIECES), st.characters(exclude_categories=["Cs"])), max_size=12
).map("".join)


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_the_quick_look_misses_nothing(text):
    expected = text
    for kind in KINDS:
        expected = kind.pattern.sub(
            lambda m, kind=kind: kind.placeholder if kind.holds(m) else m[0], expected
        )
    assert masked(text)[0] == expected


def test_batches_keep_their_order_and_count_all():
    texts = from_strings(["甲", "电话13812345678", "", "a@b.cn和c@d.cn", "乙"])
    result, counts = mask_private(texts)
    assert result.texts() == ["甲", "电话<电话>", "", "<邮箱>和<邮箱>", "乙"]
    assert counts == {"邮箱": 2, "身份证号": 0, "银行卡号": 0, "电话": 1, "IP地址": 0}
    assert mask_private(from_strings([]))[0].count == 0
