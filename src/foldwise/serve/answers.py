"""What the server's routes take and give, as its OpenAPI schema has it, and a page of that schema for people.

The page is plain HTML: no script, and nothing from elsewhere.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from foldwise.serve.faces import Box
from foldwise.serve.shelf import Entry


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Problem(_Body):
    """Why there is no answer."""

    error: str = Field(description="The status in words.")
    reason: str = Field(description="What is wrong, and what would help.")


class FaceAnswer(_Body):
    """The answer for a face, or for a whole picture."""

    box: tuple[int, int, int, int] | None = Field(
        description="Left, top, width and height in pixels of the upright picture; null: the whole picture."
    )
    label: str
    confidence: float = Field(ge=0, le=1, description="The label's probability by the model's own count.")
    probabilities: dict[str, float] = Field(description="Of each class; they sum to 1.")


class FileAnswer(_Body):
    """The answer for one picture."""

    width: int = Field(description="Pixels, upright.")
    height: int
    label: str = Field(description="Of the first of `faces`.")
    confidence: float = Field(ge=0, le=1)
    faces: list[FaceAnswer] = Field(
        min_length=1, description="The largest first; the whole picture where no face was looked for, or none found."
    )


class PredictAnswer(_Body):
    """What a model says of pictures."""

    model: str
    version: str = Field(description="Of all that decides the answer: with the same version it is the same.")
    metric: str
    score: float | None = Field(description="Of the model on images that it had not seen; null: none was held out.")
    standard_error: float | None
    time_ms: float = Field(ge=0, description="From the head of the request to the answer.")
    files: list[FileAnswer]


class RunAnswer(_Body):
    """A run or a blend."""

    name: str
    aliases: list[str]
    kind: str = Field(description="`run` or `blend`.")
    competition: str
    metric: str
    score: float | None = Field(description="Out of fold; of a blend its estimate.")
    standard_error: float | None
    interval: tuple[float, float] | None = Field(description="95%, around the score.")
    n_scored: int | None = Field(description="Images that the score is on.")
    track: str
    marks: list[str]
    classes: list[str]
    members: list[str] = Field(description="Runs of a blend, the heaviest first.")
    parameters: int | None = Field(description="Of one model.")
    weights: bool = Field(description="Whether it can be asked here: its weights are, and are those of its record.")
    reason: str | None = Field(description="Why it cannot.")


class RunsAnswer(_Body):
    """The runs and blends of the project."""

    default: str = Field(description="What is asked where nobody says what.")
    competition: str
    title: str
    card: bool = Field(description="Whether there is a model card, at /card.")
    runs: list[RunAnswer]


class HealthAnswer(_Body):
    """That the server works."""

    status: str
    model: str = Field(description="What is asked where nobody says what.")
    version: str
    models: list[str] = Field(description="What is held in memory.")
    waiting: int = Field(description="Images that wait.")
    uptime_s: float


class Nothing(_Body):
    """No parameters: others are refused, so that a misspelt one is noticed."""


class _Asked(_Body):
    model: str | None = Field(None, max_length=200, description="A name of /runs; by default that of /health.")


class AskedPredict(_Asked):
    """Parameters of /predict."""

    faces: bool = Field(False, description="Look for faces, and answer for each of them.")


class AskedExplain(_Asked):
    """Parameters of /explain."""

    box: str | None = Field(
        None,
        pattern=r"^[0-9]{1,5},[0-9]{1,5},[1-9][0-9]{0,4},[1-9][0-9]{0,4}$",
        description="This face alone: left,top,width,height, as /predict gives them.",
    )


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Answers that are a `Problem`, as FastAPI takes them."""
    return {status: {"model": Problem, "description": HTTPStatus(status).phrase} for status in statuses}


GETS = problems(421, 422, 429, 500)
POSTS = problems(400, 403, 404, 408, 413, 415, 421, 422, 429, 500, 503)


def form(most: int) -> dict[str, Any]:
    """The body of a POST, as OpenAPI has it: the routes read it themselves, within the limits."""
    files = {
        "type": "array",
        "items": {"type": "string", "format": "binary"},
        "minItems": 1,
        "maxItems": most,
        "description": "JPEG, PNG, WebP, BMP or GIF; any size and colours.",
    }
    schema = {"type": "object", "required": ["files"], "properties": {"files": files}, "additionalProperties": False}
    media = "image/jpeg, image/png, image/webp, image/bmp, image/gif"
    content = {"multipart/form-data": {"schema": schema, "encoding": {"files": {"contentType": media}}}}
    return {"requestBody": {"required": True, "content": content}}


def face_answer(box: Box | None, row: NDArray[np.float64], classes: Sequence[str]) -> FaceAnswer:
    """The answer of a row of probabilities, for a face or (None) a whole picture."""
    first = int(row.argmax())
    return FaceAnswer(
        box=None if box is None else (box.left, box.top, box.width, box.height),
        label=classes[first],
        confidence=round(float(row[first]), 6),
        probabilities={name: round(float(p), 6) for name, p in zip(classes, row, strict=True)},
    )


def listed(entry: Entry, loaded: Sequence[str]) -> RunAnswer:
    """A run or blend as /runs has it; what is loaded can be asked whether or not its weights are still there."""
    here = entry.unserved is None or entry.name in loaded
    return RunAnswer(
        name=entry.name,
        aliases=list(entry.aliases),
        kind=entry.kind,
        competition=entry.competition,
        metric=entry.metric,
        score=entry.score,
        standard_error=entry.standard_error,
        interval=entry.interval,
        n_scored=entry.n_scored,
        track=entry.track,
        marks=list(entry.marks),
        classes=list(entry.classes),
        members=[name for name, _ in entry.members],
        parameters=entry.parameters,
        weights=here,
        reason=None if here else entry.unserved,
    )


def reference(schema: dict[str, Any]) -> str:
    """An OpenAPI schema as a page of its routes and of what they give."""
    cards = []
    for path, methods in schema["paths"].items():
        for method, route in methods.items():
            rows = [("query", each["name"], each.get("description", "")) for each in route.get("parameters", ())]
            if "requestBody" in route:
                files = route["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]["files"]
                count = f"1 to {files['maxItems']} files" if files["maxItems"] > 1 else "one file"
                rows.append(("form", "files", f"{count}: {files['description']}"))
            refused = sorted(status for status in route["responses"] if status != "200")
            rows.append(("answer", "200", _shape(route["responses"]["200"])))
            rows.append(("refusal", ", ".join(refused), "Problem; with 429 and 503 the header Retry-After, in seconds"))
            cards.append(_card(f"{method.upper()} {path}", route.get("description", ""), rows))
    for name, model in schema["components"]["schemas"].items():
        rows = [(key, _kind(each), each.get("description", "")) for key, each in model.get("properties", {}).items()]
        cards.append(_card(name, model.get("description", ""), rows))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Foldwise: HTTP interface</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="base.css">
<link rel="stylesheet" href="page.css">
</head>
<body>
<header>
<h1>HTTP interface</h1>
<p class="soft">For programs: <a href="openapi.json">openapi.json</a>. <code>WS /mirror?model=</code> takes the frames
of a camera as binary messages, one at a time, and answers each in JSON.</p>
<p><code>curl -F files=@face.jpg 'http://127.0.0.1:8000/predict?faces=true'</code></p>
</header>
<main>
{"".join(cards)}
</main>
</body>
</html>
"""


def _card(heading: str, text: str, rows: Sequence[Sequence[str]]) -> str:
    lines = "".join(
        f'<tr><td class="soft">{html.escape(first)}</td><td><code>{html.escape(second)}</code></td>'
        f"<td>{html.escape(third)}</td></tr>"
        for first, second, third in rows
    )
    return (
        f'<section class="card"><h2><code>{html.escape(heading)}</code></h2><p>{html.escape(text)}</p>'
        f'<div class="scroll"><table>{lines}</table></div></section>\n'
    )


def _shape(answer: dict[str, Any]) -> str:
    for kind, media in answer.get("content", {}).items():
        return _kind(media["schema"]) if "$ref" in media["schema"] else kind
    return "nothing"


def _kind(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "anyOf" in schema:
        return " or ".join(_kind(each) for each in schema["anyOf"])
    if schema.get("type") == "array":
        return f"list of {_kind(schema['items'])}" if "items" in schema else "list"
    return str(schema.get("type", ""))
