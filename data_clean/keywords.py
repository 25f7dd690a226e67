"""Keywords looked for in every text, all at once: an Aho-Corasick automaton as flat arrays.

A. V. Aho, M. J. Corasick: Efficient string matching (1975), https://doi.org/10.1145/360825.360855. The alphabet
is not Unicode but the classes of characters that occur in keywords, so that upper and lower case, full and half
width are one; every other character resets the automaton at no cost. Transitions are a hash table: a user's list
of blocked words may have 100,000 entries with thousands of different characters.
"""

from collections import deque
from functools import cache
from typing import NamedTuple

import numpy as np
from numba import njit

from data_clean.characters import kinds

# What a keyword tells, as bits of an output.
BOILERPLATE, MARKUP, BLOCKED, MORE = 1, 2, 4, 8
LINK = 4  # bits by which the length of the beginning of a link is shifted in an output
CLASS = 8  # bits by which the class of a character is shifted in its kind
PAIRS = 1 << 16

# What advertisements and page frames say, and texts about them hardly do; words such as 举报 or 办证, which news
# use too, are left out. Entries are separated by |, since some contain spaces; they also match in full width.
ADVERTISING = """
点击这里|点击此处|点击下载|点击领取|点击进入|点击查看|点击购买|點擊這裡|點擊下載|领取礼包|领取大礼包|免费领取|名额有限|先到先得|
限时优惠|限时特价|限时抢购|特价促销|全场一折|全场二折|全场三折|全场五折|天天有红包|加微信|加我微信|添加微信|加qq|qq群|免费咨询|
咨询热线|订购热线|在线客服|扫一扫|扫码关注|扫描二维码|关注本站|关注公众号|关注我们|诚招代理|招商加盟|货到付款|代开发票|立即购买|
加入购物车|立即下载|立即注册|马上注册|全文在线阅读|无弹窗|最新网址|备用网址|六合彩|时时彩|娱乐城开户
"""
NAVIGATION = """
返回顶部|返回首页|返回列表|上一页|下一页|上一篇:|下一篇:|上一章|下一章|友情链接|友情連結|广告合作|联系我们|聯絡我們|
网站地图|網站地圖|网站首页|设为首页|加入收藏|您的位置|您当前的位置|热门推荐|相关推荐|猜你喜欢|阅读全文|閱讀全文|
登录后可|登录后才能|登录后查看|请先登录|忘记密码|免费注册|浏览器不支持|的浏览器不|浏览器版本过低|版权所有|版權所有|翻版必究|备案号|
icp备|公网安备|侵权必删|转载请注明|打印本页|关闭窗口|评论(0)|赞(0)|发表评论|我要评论|浏览次数|阅读次数|点击次数|
只看该作者|发新帖|才可以回帖|
all rights reserved
"""
MORE_ENDS = "展开|更多|全文|详细|[详细]|更多>>|read more|readmore"
# Left over when a page is turned into text: tags, entities, scripts, styles.
MARKUPS = """
<div|</div|<span|</span|<p>|</p>|<br>|<br/|<br /|<td|</td|<tr|</tr|<li>|</li>|<ul|<img|<a href|</a>|<script|</script|
<style|<table|<font|</font|<input|<iframe|<!--|&nbsp;|&lt;|&gt;|&amp;|&quot;|&#39;|&ldquo;|&rdquo;|&mdash;|&hellip;|javascript:|function(|
document.get|document.write|window.location|getelementbyid|onclick=|href=|style="|class="|{margin|{color|font-size:|text-align:|
!important|charset=
"""
LINKS = "http://|https://|www."


class Automaton(NamedTuple):
    """States are numbered from the root, 0; transitions not in the table go the way of the failure links."""

    kinds: np.ndarray  # (0x110000,) uint32 kinds of characters with their classes; class 0: in no keyword
    pairs: np.ndarray  # (PAIRS,) bool at pair_slot: whether a keyword may begin with these two classes
    first: np.ndarray  # (classes,) int32 state after a character at the root
    keys: np.ndarray  # (2**k,) int64 state * classes + class of a transition, -1 where the slot is free
    targets: np.ndarray  # (2**k,) int32 its target
    fail: np.ndarray  # (states,) int32
    outputs: np.ndarray  # (states,) uint8 what the keywords tell that end here


@cache
def automaton(block_words: tuple[str, ...] = ()) -> Automaton:
    """Of all lists above and of a user's own words; case and width of letters make no difference."""
    outputs: dict[str, int] = {}
    for words, output in (
        (listed(ADVERTISING) + listed(NAVIGATION), BOILERPLATE),
        (listed(MORE_ENDS), MORE),
        (listed(MARKUPS), MARKUP),
        (list(block_words), BLOCKED),
    ):
        for word in map(fold, words):
            outputs[word] = outputs.get(word, 0) | output
    for word in listed(LINKS):
        outputs[word] = outputs.get(word, 0) | len(word) << LINK
    return build(outputs)


def listed(words: str) -> list[str]:
    """The entries of a list above."""
    return words.replace("\n", "").split("|")


def fold(text: str) -> str:
    """Lower case, half-width letters: the form in which keywords are compared."""
    half = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
    return "".join(char.lower() if len(char.lower()) == 1 else char for char in text.translate(half))


def build(outputs: dict[str, int]) -> Automaton:
    """The automaton of keywords (folded, not empty), each with its output."""
    classes = {char: number for number, char in enumerate(sorted(set("".join(outputs))), 1)}
    edges: list[dict[int, int]] = [{}]
    told = [0]
    for word, output in outputs.items():
        state = 0
        for char in word:
            if classes[char] not in edges[state]:
                edges[state][classes[char]] = len(edges)
                edges.append({})
                told.append(0)
            state = edges[state][classes[char]]
        told[state] |= output
    fail = np.array(failure_links(edges, told), np.int32)
    first = np.zeros(len(classes) + 1, np.int32)
    first[list(edges[0])] = list(edges[0].values())
    pairs = np.zeros(PAIRS, np.bool_)
    for number, state in edges[0].items():
        if told[state]:  # a keyword of one character, whatever stands before it
            pairs[[pair_slot(before, number) for before in range(len(first))]] = True
        pairs[[pair_slot(number, second) for second in edges[state]]] = True
    keys, targets = transitions(edges, len(first))
    return Automaton(classified(classes), pairs, first, keys, targets, fail, np.array(told, np.uint8))


def failure_links(edges: list[dict[int, int]], told: list[int]) -> list[int]:
    """The state of the longest proper suffix, for every state; adds to `told` what suffixes tell."""
    fail = [0] * len(edges)
    queue = deque(edges[0].values())
    while queue:
        state = queue.popleft()
        told[state] |= told[fail[state]]
        for number, target in edges[state].items():
            queue.append(target)
            suffix = fail[state]
            while suffix and number not in edges[suffix]:
                suffix = fail[suffix]
            fail[target] = edges[suffix].get(number, 0)
    return fail


def classified(classes: dict[str, int]) -> np.ndarray:
    """Kinds of characters together with their keyword classes, (0x110000,) uint32."""
    table = kinds().copy()
    folded = {chr(code): fold(chr(code)) for code in (*range(0x600), *range(0xFF01, 0xFF5F))}
    for char, to in (folded | {char: char for char in classes}).items():
        table[ord(char)] |= np.uint32(classes.get(to, 0) << CLASS)
    return table


def transitions(edges: list[dict[int, int]], classes: int) -> tuple[np.ndarray, np.ndarray]:
    """All transitions but the root's in an open hash table: keys, targets."""
    pairs = [
        (state * classes + n, target) for state, row in enumerate(edges) if state for n, target in row.items()
    ]
    size = 1 << (2 * len(pairs) + 1).bit_length()
    keys, targets = np.full(size, -1, np.int64), np.zeros(size, np.int32)
    for key, target in pairs:
        slot = slot_of(key, size)
        while keys[slot] >= 0:
            slot = (slot + 1) & (size - 1)
        keys[slot], targets[slot] = key, target
    return keys, targets


@njit(cache=True, nogil=True)
def pair_slot(first, second):
    """Where pairs of classes are noted; different pairs may share a place."""
    return (np.uint64(first) * np.uint64(40503) + np.uint64(second)) & np.uint64(PAIRS - 1)


@njit(cache=True, nogil=True)
def slot_of(key, size):
    """Where the search for a key begins in a table of 2**k slots (Fibonacci hashing)."""
    return np.int64((np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)) & (size - 1)


@njit(cache=True, nogil=True)
def step(first, keys, targets, fail, state, number):
    """The state after a character of class `number`."""
    if number == 0:
        return np.int64(0)
    while state:
        key = state * len(first) + number
        slot = slot_of(key, len(keys))
        while keys[slot] >= 0:
            if keys[slot] == key:
                return np.int64(targets[slot])
            slot = (slot + 1) & (len(keys) - 1)
        state = np.int64(fail[state])
    return np.int64(first[number])
