"""What a run writes while it goes: log.jsonl, and a progress bar on a terminal or plain lines elsewhere."""

import json
import sys
import time
from pathlib import Path

from tqdm import tqdm

from minift.memory import peak_memory_mib


class Log:
    """One JSON object a line, flushed as it is written, and the same on the screen."""

    def __init__(self, path: Path, first: int, total: int, every: int, quiet: bool = False):
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self.first, self.total, self.every, self.quiet = first, total, every, quiet
        self.start = time.perf_counter()
        self.tokens, self.elapsed = 0, 0.0
        self.bar = tqdm(
            total=total, initial=first, unit="step", desc="train", disable=quiet or not sys.stderr.isatty()
        )

    def step(self, step: int, tokens: int, device, **values) -> None:
        """Record one finished step, counted from 0; `tokens` are its real tokens, padding left out."""
        done, elapsed = step + 1 - self.first, time.perf_counter() - self.start
        self.tokens, self.elapsed = self.tokens + tokens, elapsed
        record = {
            "step": step + 1,
            "total_steps": self.total,
            **{k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()},
            "tokens_per_second": round(self.tokens / elapsed, 1),
            "peak_memory_mib": round(peak_memory_mib(device)),
            "elapsed_s": round(elapsed, 2),
            "remaining_s": round(elapsed / done * (self.total - step - 1), 1),
        }
        self.write(record)
        shown = (
            f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  {record['tokens_per_second']:.0f} tokens/s  "
            f"peak {record['peak_memory_mib']} MiB"
        )
        self.bar.set_postfix_str(shown, refresh=False)
        self.bar.update()
        if self.bar.disable and not self.quiet and ((step + 1) % self.every == 0 or step + 1 == self.total):
            print(f"step {step + 1}/{self.total}  {shown}  {record['remaining_s']:.0f} s left", flush=True)

    def write(self, record: dict) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.bar.close()
        self.file.close()


def read_log(path: Path) -> list[dict]:
    """The records of a log; a last line cut off by a crash is left out."""
    records = []
    for line in Path(path).read_text(encoding="utf-8").split("\n"):
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records
