"""The server against its own OpenAPI schema: whatever is sent, by the schema or against it, is answered as it says.

schemathesis makes the requests; all of its checks are on.
"""

from __future__ import annotations

from collections import Counter

import pytest
import schemathesis
import torch
from fake_models import kept_model, make_backend, png
from hypothesis import strategies as st
from schemathesis.engine import events, from_schema

from foldwise.serve.app import create_app
from foldwise.serve.guard import LOOPBACK

pytestmark = pytest.mark.slow

PICTURES = {
    "image/png": [png(0, (1, 1)), png(200, (60, 40))],
    "image/jpeg": [png(100, (33, 17), "JPEG")],
}
OR_UNFIT = {"expected-statuses": ["2xx", "404", "422"]}
for kind, contents in PICTURES.items():
    schemathesis.openapi.media_type(kind, st.sampled_from(contents))


def test_every_answer_is_as_the_schema_says():
    torch.set_num_threads(1)
    model = kept_model("cnn_3block")
    backend = make_backend(explainer=lambda _name: model)
    app = create_app(backend, hosts=[*LOOPBACK, "testserver"])
    config = schemathesis.Config.from_dict(
        {
            "seed": 1,
            "phases": {"stateful": {"enabled": False}},
            "generation": {"mode": "all", "max-examples": 10, "database": "none"},
            # No schema can say that a box must lie in the picture.
            "operations": [{"include-path": "/explain", "checks": {"positive_data_acceptance": OR_UNFIT}}],
        }
    )
    schema = schemathesis.openapi.from_asgi("/openapi.json", app, config=config)
    failures, errors, statuses = {}, [], Counter()
    try:
        for event in from_schema(schema).execute():
            if isinstance(event, events.ScenarioFinished):
                recorder = event.recorder
                for interaction in recorder.interactions.values():
                    if interaction.response is not None:
                        statuses[recorder.label, interaction.response.status_code] += 1
                for check in (check for checks in recorder.checks.values() for check in checks):
                    if (found := check.failure_info) is not None:
                        failures[recorder.label, check.name] = f"{found.failure}\n{found.code_sample}"
            elif isinstance(event, events.NonFatalError | events.FatalError):
                errors.append(str(event))
    finally:
        backend.close()
    assert not errors
    assert not failures
    routes = {f"{method.upper()} {path}" for path, methods in app.openapi()["paths"].items() for method in methods}
    assert {label for label, status in statuses if status == 200} == routes
    assert statuses["POST /predict", 422]
    assert statuses["POST /predict", 405] or statuses["GET /health", 405]
