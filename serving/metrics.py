"""Counters in Prometheus' text format (https://prometheus.io/docs/instrumenting/exposition_formats/)."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
PREFIX = "baby_llama_"


class Histogram:
    """How many observations lie below each bound, and their sum."""

    def __init__(self, bounds: tuple[float, ...] = SECONDS):
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str) -> list[str]:
        rows, total = [], 0
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            total += count
            rows.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*rows, f"{name}_sum {self.sum:.6f}", f"{name}_count {total}"]


class Metrics:
    """What the server has done. All of it is counted in the event loop's thread, so without locks."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()  # (path, status) -> answers
        self.request_seconds = Histogram()
        self.first_token_seconds = Histogram()

    def text(self, engine: Mapping[str, float]) -> str:
        """All metrics. engine: Engine.stats()."""
        lines = [
            *header("http_requests_total", "counter", "HTTP answers by path and status; 499: client gone")
        ]
        for (path, status), count in sorted(self.requests.items()):
            lines.append(f'{PREFIX}http_requests_total{{path="{path}",status="{status}"}} {count}')
        for name, histogram, text in (
            ("request_seconds", self.request_seconds, "Completion requests from arrival to last byte"),
            ("first_token_seconds", self.first_token_seconds, "From arrival to the first token"),
        ):
            lines += header(name, "histogram", text) + histogram.lines(PREFIX + name)
        for key, kind, text in (
            ("running", "gauge", "Answers being generated"),
            ("waiting", "gauge", "Answers waiting for a slot"),
            ("slots", "gauge", "Answers that can be generated together"),
            ("requests", "counter", "Answers asked of the engine"),
            ("prompt_tokens", "counter", "Tokens of prompts"),
            ("generated_tokens", "counter", "Tokens generated"),
            ("cancelled", "counter", "Answers given up: client gone, or out of time"),
            ("errors", "counter", "Answers that failed"),
        ):
            name = f"engine_{key}" + ("_total" if kind == "counter" else "")
            lines += header(name, kind, text) + [f"{PREFIX}{name} {engine.get(key, 0)}"]
        return "\n".join(lines) + "\n"


def header(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP {PREFIX}{name} {text}", f"# TYPE {PREFIX}{name} {kind}"]
