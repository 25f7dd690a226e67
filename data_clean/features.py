"""Every feature the quality rules look at, of many texts, in one compiled pass over their UTF-8.

Shares lie between 0 and 1; unless said otherwise they are shares of the visible characters, i.e. of all but
whitespace. Words play no part: Chinese has no spaces between them, and what Gopher and FineWeb measure in n-grams
of words can be measured in n-grams of characters, at a hundredth of the cost of segmenting.
"""

import numpy as np
from numba import njit

from data_clean.characters import (
    BRACKET,
    BULLET,
    DIGIT,
    GROUP,
    LINE_END,
    SENTENCE_END,
    SPACE,
    decode,
)
from data_clean.keywords import (
    BLOCKED,
    BOILERPLATE,
    CLASS,
    LINK,
    MARKUP,
    MORE,
    Automaton,
    automaton,
    pair_slot,
    slot_of,
    step,
)
from data_clean.repetition import (
    ECHOES,
    FUNCTION_WORDS,
    REPEATED8,
    REPEATED12,
    REPEATED16,
    REPETITIONS,
    SAMPLE,
    TOP2,
    TOP3,
    TOP4,
    repetition,
    room,
)
from data_clean.texts import Texts

# name of a column -> what it measures, in the words of the report
FEATURES = {
    "characters": "字符数",
    "content": "文字数（字母、汉字、数字、附标）",
    "chinese": "汉字占比",
    "content_share": "文字占比",
    "punctuation": "标点占比",
    "symbols": "符号占比",
    "digits": "数字占文字的比例",
    "spaces": "空白占全部字符的比例",
    "lines": "非空行数",
    "line_length": "平均行长（不计空白）",
    "ended_lines": "以句末标点结尾的行占比",
    "cut_lines": "以省略号或“更多”等结尾的行占比",
    "bullet_lines": "以项目符号开头的行占比",
    "repeated_lines": "重复行占行数的比例",
    "repeated_line_text": "重复行的字占比",
    "brackets": "【】内的字占比",
    "links": "网址的字占比",
    "boilerplate": "含广告或导航用语的句子占比",
    "markup": "含 HTML 残留的句子占比",
    "blocked": "含屏蔽词的句子占比",
    "entropy": "单字分布的熵（nat）",
    "function_words": "常用虚词的种数",
    "top_2gram": "最常见的二字串（首次除外）占比",
    "top_3gram": "最常见的三字串（首次除外）占比",
    "top_4gram": "最常见的四字串（首次除外）占比",
    "repeated_8gram": "前面出现过的八字串占比",
    "repeated_12gram": "前面出现过的十二字串占比",
    "repeated_16gram": "前面出现过的十六字串占比",
    "echoes": "20 字之内又前面出现过的八字串占比",
}
COLUMN = {name: column for column, name in enumerate(FEATURES)}
# The stop words that FineWeb-2 found for Chinese (presets.py, FINEWEB2), and 于与后, which it has only as 於與後.
STOP_WORDS = np.array(list(map(ord, "的年在月是和日了於·為有被人中为他與後也而由于与后")))

# What is counted of a text, behind what `repetition` counts and the groups of characters.
GROUPS = REPETITIONS
(
    VISIBLE, LINES, ENDED, CUT, BULLETED, REPEATED_LINES, REPEATED_LINE_TEXT, BRACKET_TEXT, LINK_TEXT, LINK_END,
    BOILERPLATE_TEXT, MARKUP_TEXT, BLOCKED_TEXT, COUNTERS,
) = range(GROUPS + 5, GROUPS + 19)  # fmt: skip
OPEN, CLOSE = 1 << 8, 1 << 9  # notes of brackets, beside the outputs of keywords
ZERO, ONE = np.uint64(0), np.uint64(1)
HASH = np.uint64(0x9E3779B97F4A7C15)
FIELD = 12  # bits of a counter in a word; five of them are packed in one


def measure(texts: Texts, keywords: Automaton | None = None) -> np.ndarray:
    """All features of all texts, (n, len(FEATURES)) float32, columns in the order of FEATURES.

    keywords: an automaton with the user's blocked words; without it only the built-in lists are looked for.
    """
    size = int(texts.sizes.max(initial=0)) + 1
    return _features(*_tally(*texts, *(keywords or automaton()), STOP_WORDS, *room(), size))


def _features(tally: np.ndarray, entropy: np.ndarray) -> np.ndarray:
    """From counts (n, COUNTERS) and entropies (n,) to what FEATURES lists."""
    letters, digits, punctuation, symbols, spaces = tally[:, GROUPS : GROUPS + 5].T
    columns = tally.T
    visible = columns[VISIBLE]
    content = visible - punctuation - symbols
    shown, sample, lines = np.maximum(visible, 1), np.clip(visible, 1, SAMPLE), np.maximum(columns[LINES], 1)
    values = {
        "characters": visible + spaces,
        "content": content,
        "chinese": (content - letters - digits) / shown,
        "content_share": content / shown,
        "punctuation": punctuation / shown,
        "symbols": symbols / shown,
        "digits": digits / np.maximum(content, 1),
        "spaces": spaces / np.maximum(visible + spaces, 1),
        "lines": columns[LINES],
        "line_length": visible / lines,
        "ended_lines": columns[ENDED] / lines,
        "cut_lines": columns[CUT] / lines,
        "bullet_lines": columns[BULLETED] / lines,
        "repeated_lines": columns[REPEATED_LINES] / lines,
        "repeated_line_text": columns[REPEATED_LINE_TEXT] / shown,
        "brackets": columns[BRACKET_TEXT] / shown,
        "links": columns[LINK_TEXT] / shown,
        "boilerplate": columns[BOILERPLATE_TEXT] / shown,
        "markup": columns[MARKUP_TEXT] / shown,
        "blocked": columns[BLOCKED_TEXT] / shown,
        "entropy": entropy,
        "function_words": columns[FUNCTION_WORDS],
        # Occurrences after the first times length, as MAP-CC counts them; they may overlap.
        "top_2gram": np.minimum(columns[TOP2] * 2 / sample, 1),
        "top_3gram": np.minimum(columns[TOP3] * 3 / sample, 1),
        "top_4gram": np.minimum(columns[TOP4] * 4 / sample, 1),
        "repeated_8gram": columns[REPEATED8] / sample,
        "repeated_12gram": columns[REPEATED12] / sample,
        "repeated_16gram": columns[REPEATED16] / sample,
        "echoes": columns[ECHOES] / sample,
    }
    return np.stack([values[name] for name in FEATURES], 1, dtype=np.float32, casting="same_kind")


@njit(cache=True, nogil=True)
def _tally(
    data, starts, kinds, pairs, first, keys, targets, fail, outputs, words,
    names_of, names, places, gram_keys, counts, last, table, max_size,
):  # fmt: skip
    """Count everything in every text: (n, COUNTERS) int64, and the entropies (n,) float64."""
    tallies, entropies = np.zeros((len(starts) - 1, COUNTERS), np.int64), np.zeros(len(starts) - 1)
    visible, notes = np.empty(max_size, np.uint32), np.empty((2, max_size), np.int32)
    newlines = 0
    for byte in data:
        newlines += byte == 0x0A
    max_lines = min(newlines + 1, max_size)
    hashes, ends = np.empty(max_lines, np.uint64), np.empty(max_lines, np.int64)
    line_table = np.zeros(16, np.uint64)
    for text in range(len(starts) - 1):
        tally = tallies[text]
        lines, noted = _scan(
            data[starts[text] : starts[text + 1]], kinds, pairs, first, keys, targets, fail, outputs,
            tally, visible, hashes, ends, notes,
        )  # fmt: skip
        size = min(tally[VISIBLE], SAMPLE)
        if size:
            slots = 16
            while slots < 2 * lines:
                slots *= 2
            if slots > len(line_table):
                line_table = np.zeros(slots, np.uint64)
            _judge_lines(kinds, visible, hashes[:lines], ends, line_table[:slots], tally)
            if noted:
                _judge_notes(kinds, visible, ends[:lines], notes[:, :noted], tally)
            entropies[text] = repetition(
                visible[:size], words, names_of, names, places, gram_keys, counts, last, table, tally
            )
    return tallies, entropies


@njit(cache=True, nogil=True)
def _scan(
    data, kinds, pairs, first, keys, targets, fail, outputs, tally, visible, hashes, ends, notes
):  # fmt: skip
    """Copy the visible characters of a text, and note where lines end and where keywords and brackets are.

    Returns the numbers of lines and notes. The common way through the loop has no branches that depend on the text.
    """
    i, size, lines, before, line_hash = ZERO, ZERO, ZERO, ZERO, ZERO
    noted, state, stop = 0, np.int64(0), np.uint64(len(data))
    while i < stop:
        packed = ZERO
        for _ in range((1 << FIELD) - 1):
            if i >= stop:
                break
            code, i = decode(data, i)
            kind = np.uint64(kinds[code])
            group, number = kind & np.uint64(GROUP), kind >> np.uint64(CLASS)
            packed += ONE << np.uint64(FIELD) * group  # Chinese ones, the last group, fall off the end
            is_visible = np.uint64(group != SPACE)
            visible[size] = code
            size += is_visible
            line_hash += ((line_hash ^ code) * HASH - line_hash) * is_visible
            hashes[lines], ends[lines] = line_hash, size
            is_newline = np.uint64(code == 0x0A)
            lines += is_newline
            line_hash *= ONE - is_newline
            if state or pairs[pair_slot(before, number)]:
                state = step(
                    first, keys, targets, fail, state if state else np.int64(first[before]), np.int64(number)
                )
                if outputs[state]:
                    notes[0, noted], notes[1, noted] = size - ONE, outputs[state]
                    noted += 1
                    if outputs[state] >> LINK:
                        _measure_link(data, np.int64(i), np.int64(outputs[state]) >> LINK, tally)
                if state == first[number]:
                    state = np.int64(0)  # a single character is in `before`
            before = number
            if kind & np.uint64(BRACKET):
                notes[0, noted], notes[1, noted] = size - ONE, OPEN if code == 0x3010 else CLOSE
                noted += 1
        for group in range(5):
            tally[GROUPS + group] += np.int64(packed >> np.uint64(FIELD * group)) & ((1 << FIELD) - 1)
    hashes[lines], ends[lines] = line_hash, size
    tally[VISIBLE] = size
    return np.int64(lines) + 1, noted


@njit(cache=True, nogil=True)
def _measure_link(data, i, length, tally):
    """A link whose beginning, of this length, ends before data[i]: up to a space, a quote or a Chinese character."""
    if i <= tally[LINK_END]:
        return  # https://www.
    end = i
    while end < len(data) and 0x20 < data[end] < 0x7F and data[end] != 0x22 and data[end] != 0x3C:
        end += 1
    tally[LINK_TEXT] += length + end - i
    tally[LINK_END] = end


@njit(cache=True, nogil=True)
def _judge_lines(kinds, visible, hashes, ends, table, tally):
    """How lines begin and end, and which are equal to one before, whitespace apart."""
    table[:] = 0
    start = 0
    for line in range(len(hashes)):
        size, end = ends[line] - start, ends[line]
        if size == 0:
            continue
        last = visible[end - 1]
        dots = size >= 3 and (last == 0x2E or last == 0x3002) and visible[end - 2] == last == visible[end - 3]
        tally[LINES] += 1
        tally[CUT] += dots or last == 0x2026 or last == 0x22EF  # ... 。。。 … ⋯
        tally[ENDED] += kinds[last] & LINE_END != 0
        tally[BULLETED] += kinds[visible[start]] & BULLET != 0
        value = hashes[line] | np.uint64(1)  # 0 is a free slot
        slot = slot_of(value, len(table))
        while table[slot] != 0 and table[slot] != value:
            slot = (slot + 1) & (len(table) - 1)
        if table[slot] != 0:
            tally[REPEATED_LINES] += 1
            tally[REPEATED_LINE_TEXT] += size
        table[slot] = value
        start = end


@njit(cache=True, nogil=True)
def _judge_notes(kinds, visible, ends, notes, tally):
    """Add the sentences that have keywords to the text of these keywords; brackets; lines that end in 更多."""
    note, line, begin, opened = 0, 0, 0, -1
    while note < notes.shape[1]:
        at = notes[0, note]
        while ends[line] <= at:
            begin = ends[line]
            line += 1
            opened = -1
        end = _sentence_end(kinds, visible, begin, ends[line])
        said = 0
        while end <= at:
            begin, end = end, _sentence_end(kinds, visible, end, ends[line])
        while note < notes.shape[1] and notes[0, note] < end:
            at, output = notes[0, note], notes[1, note]
            said |= output
            if output == OPEN:
                opened = at
            elif output == CLOSE and opened >= 0:
                tally[BRACKET_TEXT] += at - opened - 1
                opened = -1
            elif output & MORE and at == ends[line] - 1:
                tally[CUT] += 1
            note += 1
        tally[BOILERPLATE_TEXT] += end - begin if said & BOILERPLATE else 0
        tally[MARKUP_TEXT] += end - begin if said & MARKUP else 0
        tally[BLOCKED_TEXT] += end - begin if said & BLOCKED else 0
        begin = end


@njit(cache=True, nogil=True)
def _sentence_end(kinds, visible, begin, stop):
    """Where the sentence that begins here ends in its line; ? and ! within a link or before a word end none."""
    for i in range(begin + 1, stop):
        last, following = visible[i - 1], visible[i]
        is_english = last < 0x80 and following < 0x80 and kinds[following] & GROUP <= DIGIT
        if kinds[last] & SENTENCE_END != 0 and not is_english:
            return i
    return stop
