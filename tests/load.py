"""A load test of the server: `python tests/load.py [RUN]` asks a server of its own 2,000 times, 16 at a time.

It prints a table and fails if a request was lost; nothing here is a test that pytest runs.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SERVER = (
    "import sys; from pathlib import Path; from foldwise.serve.app import serve; "
    "sys.exit(serve(Path(sys.argv[1]), sys.argv[2:], port=0, rate=0, say=print))"
)


@dataclass
class Counts:
    """What came of the requests."""

    seconds: list[float] = field(default_factory=list)  # of each that was answered, without the waits before a retry
    retried: int = 0
    lost: list[str] = field(default_factory=list)


def main() -> int:
    """Start a server, ask it, print what came, stop it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", default="resnet18_64", help="a kept run with its weights")
    parser.add_argument("--root", type=Path, default=ROOT, help="the project's folder")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--at-once", type=int, default=16)
    options = parser.parse_args()
    server = subprocess.Popen(
        [sys.executable, "-u", "-c", SERVER, str(options.root), options.run], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    try:
        address, lines = "", []
        while not address:
            line = server.stdout.readline()
            if not line:
                print("the server did not start")
                return 1
            lines.append(line.strip())
            address = "".join(re.findall(r"http://\S+", line))
        told = _asked(address, server.pid, options.requests, options.at_once)
        server.send_signal(signal.SIGINT)
        rest = server.communicate(timeout=120)[0].strip().splitlines()
        told.append(("stopped by Ctrl-C", f"exit {server.returncode}, {rest[-1] if rest else 'no word'!r}"))
    finally:
        server.kill()
    width = max(len(name) for name, _ in told)
    print(f"{'model':<{width}}  {lines[0].removeprefix('model').strip()}")
    for name, value in told:
        print(f"{name:<{width}}  {value}")
    return 0 if ("lost", "0") in told and server.returncode == 0 else 1


def _asked(address: str, process: int, requests: int, at_once: int) -> list[tuple[str, str]]:
    rng = np.random.default_rng(0)
    pictures = [_picture(rng) for _ in range(64)]
    counts = Counts()
    with (
        httpx.Client(base_url=address, timeout=300, limits=httpx.Limits(max_connections=at_once)) as client,
        ThreadPoolExecutor(at_once) as pool,
    ):
        _ask(client, pictures[0], Counts())
        before = _resident_mib(process)
        began = time.perf_counter()
        list(pool.map(lambda number: _ask(client, pictures[number % len(pictures)], counts), range(requests)))
        wall = time.perf_counter() - began
        after = _resident_mib(process)
        began = time.perf_counter()
        bad = list(pool.map(lambda content: _status(client, content), [_malformed(rng, pictures) for _ in range(200)]))
        bad_s = time.perf_counter() - began
        last = _status(client, pictures[0])
        batches = dict(re.findall(r"^foldwise_batch_images_(sum|count) (\S+)", client.get("/metrics").text, re.M))
        end = _resident_mib(process)
    for reason in counts.lost[:5]:
        print(f"lost: {reason}")
    median, high = np.quantile(counts.seconds, [0.5, 0.99]) * 1e3
    refused = sum(400 <= status < 500 for status in bad)
    return [
        ("requests", f"{requests:,}, {at_once} at a time"),
        ("answered", f"{len(counts.seconds):,}"),
        ("told to come again", f"{counts.retried:,} (503), and answered then"),
        ("lost", str(len(counts.lost))),
        ("latency", f"median {median:,.0f} ms, 99 % within {high:,.0f} ms"),
        ("throughput", f"{requests / wall:.1f} a second, {wall:.0f} s in all"),
        ("images a batch", f"{float(batches['sum']) / float(batches['count']):.1f} on average"),
        ("resident memory", f"{before:,.0f} MiB before, {after:,.0f} MiB after, {end:,.0f} MiB at the end"),
        ("malformed uploads", f"{refused} of 200 refused with 4xx in {bad_s:.1f} s; then a picture: {last}"),
        ("machine", f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"),
    ]


def _ask(client: httpx.Client, content: bytes, counts: Counts) -> None:
    for _ in range(100):
        began = time.perf_counter()
        try:
            response = client.post("/predict", files={"files": ("a.png", content)})
        except httpx.HTTPError as error:
            counts.lost.append(repr(error))
            return
        if response.status_code == 503:
            counts.retried += 1
            time.sleep(float(response.headers["retry-after"]))
            continue
        if response.status_code == 200:
            counts.seconds.append(time.perf_counter() - began)
        else:
            counts.lost.append(f"{response.status_code} {response.text[:200]}")
        return
    counts.lost.append("503 a hundred times")


def _status(client: httpx.Client, content: bytes) -> int:
    return client.post("/predict", files={"files": ("a.png", content)}).status_code


def _picture(rng: np.random.Generator) -> bytes:
    """Noise over two shades, as PNG or JPEG, of one of several sizes."""
    side = int(rng.choice([48, 64, 200]))
    pixels = rng.normal(rng.uniform(60, 200), 30, (side, side, 3))
    pixels[side // 3 :] += rng.uniform(-60, 60)
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, format=str(rng.choice(["PNG", "JPEG"])))
    return file.getvalue()


def _malformed(rng: np.random.Generator, pictures: list[bytes]) -> bytes:
    """A picture cut short, with another beginning, or with something behind it; or noise."""
    content = pictures[int(rng.integers(len(pictures)))]
    return [
        content[: int(rng.integers(0, len(content) - 20))],
        rng.bytes(8) + content[8:],
        content + b"<script>alert(1)</script>",
        rng.bytes(1000),
    ][int(rng.integers(4))]


def _resident_mib(process: int) -> float:
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) / 1024


if __name__ == "__main__":
    sys.exit(main())
