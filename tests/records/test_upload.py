"""Uploads through Kaggle's own client, against a server that answers as Kaggle does: what arrives, and what is refused.

Each refusal has its message here; those that need no server are tested without one.
"""

from __future__ import annotations

import hashlib
import json
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from foldwise.data.competition import CompetitionSpec
from foldwise.data.download import KaggleError
from foldwise.errors import FoldwiseError, RecordError
from foldwise.records.history import Upload, read_history, record_upload
from foldwise.records.upload import fetch_score, upload

NOW = datetime(2025, 3, 6, 22, 15, tzinfo=UTC)
SPEC = CompetitionSpec(
    name="toy", classes=("happy", "sad"), image={"height": 8, "width": 8, "channels": 1}, test_ids="1-3"
)
STATUS = {"bad-file": 400, "stale": 401, "closed": 403, "nope": 404, "busy": 429, "down": 500}
WORDS = {400: "Submission limit of 2 per day reached", 403: "You must accept the rules"}


class Kaggle(BaseHTTPRequestHandler):
    """Takes a submission to any competition but those in STATUS, and scores it 0.66667."""

    asked: list = []  # noqa: RUF012  shared on purpose
    listed: list = []  # noqa: RUF012
    put_status = 200

    def do_POST(self):
        told = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        service = self.path.rpartition("/")[2]
        Kaggle.asked.append((service, told))
        status = STATUS.get(told.get("competitionName"), 200)
        answers = {
            "StartSubmissionUpload": {
                "token": "blob-1",
                "createUrl": f"http://127.0.0.1:{self.server.server_port}/blob",
            },
            "CreateSubmission": {"message": "Successfully submitted to faces", "ref": 4711},
            "ListSubmissions": {"submissions": Kaggle.listed},
        }
        refused = {"code": status, "message": WORDS.get(status, "no")}
        self.answer(status, answers[service] if status == 200 else refused)

    def do_PUT(self):
        Kaggle.asked.append(("PUT", self.rfile.read(int(self.headers["Content-Length"]))))
        self.answer(Kaggle.put_status, {})

    def answer(self, status, told):
        content = json.dumps(told).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture
def kaggle(tmp_path_factory, monkeypatch):
    """The client signed in with a legacy key and pointed at a server on the loopback."""
    home = tmp_path_factory.mktemp("kaggle")
    # Before the import, which looks for a token, makes its folder, and would ask the real server about it.
    for name in ("KAGGLE_API_TOKEN", "KAGGLE_API_V1_TOKEN", "https_proxy", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(home))
    monkeypatch.setenv("KAGGLE_USERNAME", "someone")
    monkeypatch.setenv("KAGGLE_KEY", "0" * 32)
    pytest.importorskip("kaggle")
    from kaggle.api.kaggle_api_extended import KaggleApi
    from kagglesdk import kaggle_env

    with ThreadingHTTPServer(("127.0.0.1", 0), Kaggle) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.PROD, address)
        monkeypatch.setattr(KaggleApi, "config", str(home / "kaggle.json"))
        for name, value in (("asked", []), ("listed", []), ("put_status", 200)):
            monkeypatch.setattr(Kaggle, name, value)
        try:
            yield Kaggle
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def no_client(monkeypatch):
    """Whoever asks for the client has gone too far."""
    monkeypatch.setattr("foldwise.records.upload.kaggle_client", lambda slug: pytest.fail("asked for the client"))


def put(root, content="id,label\n1,sad\n2,happy\n3,sad\n", *, day=1):
    digest = hashlib.sha256(content.encode()).hexdigest()
    told = {
        "competition": "toy",
        "metric": "accuracy",
        "method": "mean",
        "members": [{"run": "cnn", "weight": 0.5}, {"run": "vit", "weight": 0.5}],
        "estimate": {"score": 0.6, "standard_error": 0.01, "interval": [0.58, 0.62]},
        "submission_sha256": digest,
    }
    path = root / "submissions" / f"202503{day:02d}-120000-{digest[:8]}"
    path.mkdir(parents=True)
    (path / "submission.csv").write_text(content)
    (path / "blend.json").write_text(json.dumps(told))
    return path


def send(root, slug="faces", *, of=None, spec=SPEC, **changes):
    history = read_history(root, "toy")
    return upload(root, spec, history, history.find(of), slug, **{"now": NOW, **changes})


def note(root, *times, slug="faces", of=None):
    for time in times:
        record_upload(read_history(root, "toy").find(of), Upload(slug, f"{time}+00:00", 1, "m", "ok"))


@pytest.mark.slow
def test_a_submission_arrives_is_noted_and_its_score_fetched(kaggle, tmp_path, capsys):
    path = put(tmp_path)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    lines = send(tmp_path)
    message = f"mean of cnn 0.50, vit 0.50; accuracy 0.6000 +- 0.0100 expected [{path.name[-8:]}]"
    assert lines == [
        f"uploaded     {path.name} to faces: Successfully submitted to faces (reference 4711)",
        f"             said with it: {message}",
        "             1 of 2 uploads are left today (UTC), as far as this project's records tell",
        "next         once it is scored: make submit COMP=toy SCORE=kaggle; it stands at https://www.kaggle.com/competitions/faces",
    ]
    (start, begun), (_, sent), (create, created) = kaggle.asked
    assert (start, begun["competitionName"], begun["fileName"]) == ("StartSubmissionUpload", "faces", "submission.csv")
    assert sent == before["submission.csv"]
    assert (create, created["blobFileTokens"], created["submissionDescription"]) == (
        "CreateSubmission",
        "blob-1",
        message,
    )
    assert {name: (path / name).read_bytes() for name in before} == before
    assert json.loads((path / "uploads.json").read_text()) == {
        "schema_version": 1,
        "submission_sha256": hashlib.sha256(before["submission.csv"]).hexdigest(),
        "uploads": [
            {
                "kaggle": "faces",
                "when": "2025-03-06T22:15:00+00:00",
                "reference": 4711,
                "message": message,
                "answer": "Successfully submitted to faces",
            }
        ],
    }
    assert "0" * 32 not in (path / "uploads.json").read_text()

    def fetch():
        history = read_history(tmp_path, "toy")
        return fetch_score(history, history.find(), images=None, now=NOW)

    page = "https://www.kaggle.com/competitions/faces/submissions"
    for listed, message in (
        ([], "is not among the latest 100 submissions there\n  fix: look at {}, and give its score by SCORE=<score>"),
        ([{"ref": 4711}], "has no public score yet\n  fix: try again in a minute; or see {}"),
        ([{"ref": 4711, "errorDescription": "bad id"}], "failed at Kaggle: bad id\n  fix: see {}"),
    ):
        monkey = [{"ref": 1, "publicScore": "0.1"}, *listed]
        kaggle.listed[:] = monkey
        with pytest.raises(KaggleError) as error:
            fetch()
        assert str(error.value).startswith("KAGGLE=faces: reference 4711 ")
        assert str(error.value).endswith(message.format(page))
    kaggle.listed[:] = [{"ref": 1, "publicScore": "0.1"}, {"ref": 4711, "publicScore": "0.66667"}]
    assert fetch() == [f"recorded  public score 0.6667 of {path.name}, in its public.json"]
    public = read_history(tmp_path, "toy").find().public
    assert (public.score, public.source) == (0.66667, "kaggle")
    assert capsys.readouterr().out == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("slug", "what", "fix"),
    [
        (
            "bad-file",
            "Kaggle does not take it (400): Submission limit of 2 per day reached",
            "if these words name a limit, wait for 00:00 UTC; else see what "
            "https://www.kaggle.com/competitions/bad-file asks of a file",
        ),
        (
            "stale",
            "Kaggle does not accept the token (401): no",
            "at kaggle.com, under Settings > API, create a token; then set KAGGLE_API_TOKEN to it, "
            "or run `kaggle auth login`",
        ),
        (
            "closed",
            "Kaggle does not let you submit (403): You must accept the rules",
            "open https://www.kaggle.com/competitions/closed, accept the rules there (Join, or Rules), "
            "and see that it is still open",
        ),
        (
            "nope",
            "Kaggle has no such competition (404): no",
            "give the end of its address, kaggle.com/competitions/<this>",
        ),
        (
            "busy",
            "Kaggle asks for fewer requests (429): no",
            "if these words name a daily limit, wait for 00:00 UTC; else some minutes; see "
            "https://www.kaggle.com/competitions/busy/submissions",
        ),
        (
            "down",
            "Kaggle failed (500): no",
            "try again later; whether anything arrived is told at https://www.kaggle.com/competitions/down/submissions",
        ),
    ],
)
def test_refusals_say_what_to_do_and_are_not_noted(kaggle, tmp_path, slug, what, fix):
    path = put(tmp_path)
    with pytest.raises(KaggleError) as error:
        send(tmp_path, slug)
    assert str(error.value) == f"KAGGLE={slug}: {what}\n  fix: {fix}"
    assert not (path / "uploads.json").exists()


@pytest.mark.slow
def test_a_file_that_does_not_arrive_is_told_and_not_noted(kaggle, tmp_path, monkeypatch):
    path = put(tmp_path)
    kaggle.put_status = 400
    with pytest.raises(KaggleError) as error:
        send(tmp_path)
    assert str(error.value) == (
        "KAGGLE=faces: Kaggle did not take the file (no reason given)\n"
        "  fix: try again; or upload submission.csv by hand at https://www.kaggle.com/competitions/faces/submissions"
    )
    from kagglesdk import kaggle_env

    monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.PROD, "http://127.0.0.1:9")
    with pytest.raises(KaggleError, match=r"KAGGLE=faces: Kaggle cannot be reached, or went away\n  \(ConnectionErr"):
        send(tmp_path)
    monkeypatch.delenv("KAGGLE_USERNAME")
    monkeypatch.delenv("KAGGLE_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(KaggleError, match=r"KAGGLE=faces: there is no Kaggle token\n  fix: at kaggle\.com"):
        send(tmp_path)
    assert not (path / "uploads.json").exists()


@pytest.mark.slow
def test_the_same_bytes_go_again_only_when_told(kaggle, tmp_path):
    path = put(tmp_path, day=1)
    send(tmp_path, now=NOW - timedelta(days=1), message="first")
    put(tmp_path, day=2)  # the same bytes in another folder
    with pytest.raises(FoldwiseError) as error:
        send(tmp_path)
    assert str(error.value) == (
        f"KAGGLE=faces: these very bytes were uploaded on 2025-03-05 22:15 UTC from {path.name} (reference 4711)\n"
        "  fix: they would score the same; FORCE=1 uploads them again and costs one of the day's uploads"
    )
    assert kaggle.asked[-1][1]["submissionDescription"] == "first"
    send(tmp_path, force=True)
    send(tmp_path, "animals")
    assert len([service for service, _ in kaggle.asked if service == "CreateSubmission"]) == 3


def test_the_days_uploads_are_counted_in_utc_over_all_submissions(no_client, tmp_path):
    first = put(tmp_path, day=1)
    put(tmp_path, "id,label\n1,sad\n2,sad\n3,sad\n", day=2)
    note(tmp_path, "2025-03-05T23:59:59", "2025-03-06T20:01:00", of=first.name)
    note(tmp_path, "2025-03-06T00:00:00", slug="faces")
    put(tmp_path, "id,label\n1,happy\n2,sad\n3,sad\n", day=3)
    with pytest.raises(KaggleError) as error:
        send(tmp_path, force=True)
    assert str(error.value) == (
        "KAGGLE=faces: all 2 uploads of today are used up (00:00, 20:01 UTC)\n"
        "  fix: try again after 2025-03-07 00:00 UTC, in 1 h 45 min; "
        "where more are allowed, set `submissions_per_day` in competition.yaml"
    )
    for changes in ({"per_day": 3}, {"slug": "animals"}, {"now": NOW + timedelta(hours=2)}):
        with pytest.raises(pytest.fail.Exception, match="asked for the client"):
            send(tmp_path, **changes)


@pytest.mark.parametrize("slug", ["owner/data", "https://kaggle.com/c/x", ""])
def test_what_is_no_competition_is_refused(no_client, tmp_path, slug):
    put(tmp_path)
    with pytest.raises(FoldwiseError) as error:
        send(tmp_path, slug)
    assert str(error.value) == (
        f"KAGGLE={slug}: is not the name of a competition\n"
        "  fix: give the end of its address, kaggle.com/competitions/<this>"
    )


def test_a_wrong_file_is_refused_before_anything_is_sent(no_client, tmp_path):
    path = put(tmp_path, "id,label\n1,sad\n3,glad\n")
    with pytest.raises(RecordError) as error:
        send(tmp_path)
    where = f"{path.name}/submission.csv"
    assert str(error.value) == (
        f"{where}:3: unknown label 'glad'\n  fix: the classes are happy, sad\n"
        f"{where}: 1 of 3 ids are missing: 2\n2 errors; nothing was written."
    )
    history = read_history(tmp_path, "toy")
    (path / "submission.csv").write_text("id,label\n1,sad\n2,happy\n3,sad\n")
    with pytest.raises(RecordError, match="is not the file that blend.json describes"):  # noqa: RUF043
        upload(tmp_path, SPEC, history, history.find(), "faces", now=NOW)


def test_without_a_range_the_ids_are_those_that_a_member_predicts(no_client, tmp_path):
    path = put(tmp_path)
    spec = SPEC.model_copy(update={"test_ids": None})
    with pytest.raises(RecordError) as error:
        send(tmp_path, spec=spec)
    assert str(error.value).startswith(
        f"{path.name}: the ids that it must hold are not known: neither `test_ids` is set, nor is there a test.csv of "
        "mean of cnn 0.50, vit 0.50\n  fix: set `test_ids` in inputs/toy/competition.yaml\n"
    )
    (tmp_path / "oof" / "vit").mkdir(parents=True)
    (tmp_path / "oof" / "vit" / "test.csv").write_text("id,p_happy,p_sad\n10,0.5,0.5\n1,0.5,0.5\n2,0.5,0.5\n")
    with pytest.raises(RecordError, match="the id 3 is none of the 3 to be predicted"):
        send(tmp_path, spec=spec)
    (tmp_path / "oof" / "vit" / "test.csv").write_text("id,p_happy,p_sad\n3,0.5,0.5\n1,0.5,0.5\n2,0.5,0.5\n")
    with pytest.raises(pytest.fail.Exception, match="asked for the client"):
        send(tmp_path, spec=spec)


def test_a_score_of_what_was_not_uploaded_cannot_be_fetched(no_client, tmp_path):
    path = put(tmp_path)
    history = read_history(tmp_path, "toy")
    with pytest.raises(FoldwiseError) as error:
        fetch_score(history, history.find(), images=None, now=NOW)
    assert str(error.value) == (
        f"SCORE=kaggle: {path.name} was not uploaded from here\n"
        "  fix: make submit COMP=toy SCORE=<score>, as its page shows it"
    )
