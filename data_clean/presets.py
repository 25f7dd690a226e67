"""The quality rules: what each measures, its limit for every kind of source, and where the limit comes from.

Limits were published for web pages. They are kept for `web`, and loosened for the others where real texts of that
kind broke them (docs/cleaning_rules.md tells how many did); OURS marks limits nobody has published.

Limits for n-grams of words are converted. jieba's tokens, punctuation included, have 1.6 characters in classics in
modern Chinese and 1.7 in a chat model's answers, so 5, 7 and 10 words are 8, 12 and 16 characters. The limits are
those at which as many of 2,000 passages of classics fall as by FineWeb-2's limits on jieba's words: 0.198 on 5 words
is 0.26 on 8 characters, 0.167 on 7 is 0.17 on 12, 0.127 on 10 is 0.145 on 16. Its 0.178 newlines a word are lines
of less than 10 characters, the limit of ChineseWebText.
"""

from typing import Literal, NamedTuple

# FineWeb-2, thresholds found for Chinese (cmn_Hani) by comparing the web with Wikipedia.
FINEWEB2 = "https://github.com/huggingface/fineweb-2/blob/main/configs/cmn_Hani.yml"
# MAP-CC, the corpus of CT-LLM: rules on characters, for Chinese.
MAP_CC = "https://github.com/multimodal-art-projection/MAP-NEO/blob/main/chinese_data_clean_pipeline/filter/filter.py"
# ChineseWebText, its tool EvalWeb.
CHINESE_WEB_TEXT = "https://github.com/CASIA-LM/ChineseWebText/blob/main/preprocess.py"
# Data-Juicer's recipe for Chinese instructions, short texts.
DATA_JUICER = "https://github.com/modelscope/data-juicer/blob/main/configs/data_juicer_recipes/alpaca_cot/alpaca-cot-zh-refine.yaml"
GOPHER = (
    "https://arxiv.org/abs/2112.11446"  # Table A1; the limit is a share of lines, so it needs no conversion
)
OURS = "本项目"

PRESETS = {
    "general": "来源不明：只丢明显的坏文本",
    "encyclopedia": "百科：词条短、列表多、词条名反复出现",
    "web": "网页：最严，按公开的网页阈值",
    "books": "书籍：长，对话和诗行短",
    "medical": "医学：列表、剂量、拉丁字母多",
    "poetry": "诗词：短，有叠句，行末不一定有标点",
}


class Rule(NamedTuple):
    """Drops a text whose feature is below, or above, the limit."""

    name: str
    feature: str  # of features.FEATURES or damage.RAW_FEATURES
    drops: Literal["below", "above"]
    long_only: bool  # applies to texts of LONG characters and more only: in short ones the share says little
    limits: tuple[float, ...]  # by preset, in the order of PRESETS; 0 (below) and 1 (above) drop nothing
    source: str


# Visible characters from which the rules marked long_only apply, by preset. A quatrain of 20 characters, a definition
# of 50, an exercise of 200 is not repetitive because some 8-gram occurs twice.
LONG = (300, 300, 300, 500, 300, 300)

# fmt: off
RAW_RULES = (
    #    name           feature     drops    long   general ency. web   books medical poetry
    Rule("控制字符过多", "controls", "above", False, (0.05, 0.05, 0.05, 0.05, 0.05, 0.05), OURS),
    Rule("乱码",         "mojibake", "above", False, (0.04, 0.04, 0.04, 0.04, 0.04, 0.04), OURS),
)
RULES = (
    #    name           feature               drops    long   general ency. web   books medical poetry
    Rule("过短",         "content",            "below", False, (10,   10,   20,    10,   10,   10),   DATA_JUICER),
    Rule("文字太少",     "content_share",      "below", False, (0.33, 0.33, 0.5,   0.5,  0.33, 0.4),  OURS),
    Rule("汉字太少",     "chinese",            "below", True,  (0,    0,    0.3,   0,    0,    0.3),  CHINESE_WEB_TEXT),
    Rule("数字太多",     "digits",             "above", True,  (0.5,  0.5,  0.3,   0.3,  0.5,  0.3),  MAP_CC),
    Rule("符号太多",     "symbols",            "above", True,  (0.2,  0.2,  0.1,   0.1,  0.2,  0.3),  MAP_CC),
    Rule("空白太多",     "spaces",             "above", True,  (0.6,  0.6,  0.3,   0.4,  0.6,  0.4),  OURS),
    Rule("括号标题太多", "brackets",           "above", True,  (1,    1,    0.1,   1,    1,    1),    MAP_CC),
    Rule("没有标点",     "punctuation",        "below", True,  (0,    0.001, 0.001, 0,   0.001, 0),   MAP_CC),
    Rule("虚词太少",     "function_words",     "below", True,  (0,    0,    2,     0,    0,    0),    FINEWEB2),
    Rule("行太短",       "line_length",        "below", True,  (4,    4,    10,    4,    4,    0),    CHINESE_WEB_TEXT),
    Rule("行末少标点",   "ended_lines",        "below", True,  (0,    0,    0.106, 0,    0,    0),    FINEWEB2),
    Rule("截断的行",     "cut_lines",          "above", True,  (0.5,  0.5,  0.3,   0.5,  0.5,  1),    GOPHER),
    Rule("全是列表",     "bullet_lines",       "above", True,  (0.9,  1,    0.9,   0.9,  1,    1),    GOPHER),
    Rule("广告或网页边框", "boilerplate",      "above", False, (0.5,  0.5,  0.3,   0.5,  0.5,  0.5),  OURS),
    Rule("网址太多",     "links",              "above", False, (0.5,  0.3,  0.2,   0.2,  0.3,  0.2),  OURS),
    Rule("HTML 残留",    "markup",             "above", False, (0.5,  0.3,  0.3,   0.3,  0.3,  0.3),  OURS),
    Rule("屏蔽词",       "blocked",            "above", False, (0.2,  0.2,  0.1,   0.2,  0.2,  0.2),  OURS),
    Rule("内容重复",     "repeated_8gram",     "above", False, (0.7,  0.7,  0.6,   0.7,  0.7,  0.7),  OURS),
    Rule("同一短语反复", "echoes",             "above", True,  (0.3,  0.3,  0.1,   0.3,  0.3,  0.5),  OURS),
    Rule("重复行",       "repeated_lines",     "above", True,  (0.5,  0.5,  0.287, 0.5,  0.5,  1),    FINEWEB2),
    Rule("重复行的字",   "repeated_line_text", "above", True,  (0.3,  0.3,  0.1,   0.3,  0.3,  1),    FINEWEB2),
    Rule("二字串重复",   "top_2gram",          "above", True,  (0.3,  0.3,  0.2,   0.3,  0.3,  1),    MAP_CC),
    Rule("三字串重复",   "top_3gram",          "above", True,  (0.4,  0.4,  0.18,  0.4,  0.4,  1),    MAP_CC),
    Rule("四字串重复",   "top_4gram",          "above", True,  (0.5,  0.5,  0.16,  0.5,  0.5,  1),    MAP_CC),
    Rule("八字串重复",   "repeated_8gram",     "above", True,  (1,    1,    0.26,  1,    1,    1),    FINEWEB2),
    Rule("十二字串重复", "repeated_12gram",    "above", True,  (0.6,  0.6,  0.17,  0.6,  0.6,  1),    FINEWEB2),
    Rule("十六字串重复", "repeated_16gram",    "above", True,  (0.5,  0.5,  0.145, 0.5,  0.5,  1),    FINEWEB2),
    Rule("用字太单一",   "entropy",            "below", True,  (2.5,  2.5,  3,     2.5,  2.5,  0),    MAP_CC),
)
# fmt: on
