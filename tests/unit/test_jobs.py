"""From the command line to jobs: what each sets, its name and its key; and what is found wrong before the first."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from semantic_style.runner.check import problems
from semantic_style.runner.jobs import Job, Request, hash_of_file, make_jobs, slug
from semantic_style.runner.request import JobError, LocalFile


@pytest.fixture
def make(stub):
    def made(request: Request, workflow: dict | None = None, definitions: dict | None = None) -> list[Job]:
        known = stub.DEFINITIONS if definitions is None else definitions
        return make_jobs(workflow or stub.graph(), request, known, hash_of_file)[0]

    return made


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    for name in ("b.jpg", "a.jpg", ".hidden.jpg", "c.png", "deep/d.jpg"):
        (folder / name).write_bytes(name.encode())
    return folder


def values(jobs: list[Job], node: str = "2", name: str = "strength") -> list[Any]:
    return [job.values[node, name] for job in jobs]


def test_a_pattern_or_a_folder_is_a_job_for_each_file(make, photos: Path) -> None:
    jobs = make(Request(overs=[f"Load.image={photos}/*.jpg"]))
    assert [job.name for job in jobs] == ["a", "b"]
    assert values(jobs, "1", "image") == [LocalFile(photos / "a.jpg"), LocalFile(photos / "b.jpg")]
    assert [job.name for job in make(Request(overs=[f"Load.image={photos}"]))] == ["a", "b", "c"]
    assert [job.name for job in make(Request(overs=[f"1.image={photos}/**/*.jpg"]))] == ["a", "b", "d"]


@pytest.mark.parametrize("listed", [[], ["a.mp4", "b.webm"]])
def test_an_input_whose_pack_brings_its_own_upload_button_takes_files(make, stub, photos: Path, listed: list) -> None:
    definitions = copy.deepcopy(stub.DEFINITIONS)
    definitions["LoadImage"]["input"]["required"]["image"] = [listed]
    jobs = make(Request(overs=[f"Load.image={photos}/*.jpg"]), definitions=definitions)
    assert [job.values["1", "image"] for job in jobs] == [LocalFile(photos / "a.jpg"), LocalFile(photos / "b.jpg")]
    assert problems(stub.graph(), jobs, definitions) == []


def test_several_lists_are_a_product_or_pairs(make, photos: Path) -> None:
    request = Request(overs=[f"Load.image={photos}/*.jpg", "Work.strength=0.5|1"])
    assert [job.name for job in make(request)] == ["a_0.5", "a_1.0", "b_0.5", "b_1.0"]
    assert [job.name for job in make(replace(request, pairs=True))] == ["a_0.5", "b_1.0"]
    with pytest.raises(JobError, match="different lengths: 2, 3"):
        make(Request(overs=[f"Load.image={photos}/*.jpg", "Work.strength=0|1|2"], pairs=True))


def test_values_get_the_type_of_their_input(make) -> None:
    sets = ["Work.seed=7", "Work.strength=1", "Work.tidy=yes", "Work.text=a=b.c", "Work.model=big.safetensors"]
    (job,) = make(Request(sets=sets))
    assert job.values == {
        ("2", "seed"): 7,
        ("2", "strength"): 1.0,
        ("2", "tidy"): True,
        ("2", "text"): "a=b.c",
        ("2", "model"): "big.safetensors",
    }
    assert type(job.values["2", "strength"]) is float
    assert make(Request(sets=["Work.seed=7"]), definitions={})[0].values["2", "seed"] == 7


@pytest.mark.parametrize(
    ("spec", "text", "value"),
    [
        ([[0.5, 1.0], {}], "0.5", 0.5),
        ([[16, 32], {}], "32", 32),
        (["COMBO", {"options": [1, 2]}], "2", 2),
        ([[0.5, 1.0], {}], "2", "2"),
        (["INT,FLOAT", {}], "4", 4.0),
        (["*", {}], "4", 4.0),
    ],
)
def test_values_are_those_that_the_input_lets_one_choose_or_like_the_files(make, stub, spec, text, value) -> None:
    definitions = copy.deepcopy(stub.DEFINITIONS)
    definitions["Work"]["input"]["required"]["strength"] = spec
    assert make(Request(sets=[f"Work.strength={text}"]), definitions=definitions)[0].values == {
        ("2", "strength"): value
    }


@pytest.mark.parametrize("text", ["nan", "inf", "-inf"])
def test_numbers_that_are_none_are_refused(make, stub, text: str) -> None:
    definitions = copy.deepcopy(stub.DEFINITIONS)
    definitions["Work"]["input"]["required"]["strength"] = ["FLOAT", {}]
    jobs = make(Request(sets=[f"Work.strength={text}"]), definitions=definitions)
    assert problems(stub.graph(), jobs, definitions) == [
        f"Work.strength (node 2): {text} is no number of type FLOAT (jobs: job)"
    ]


def test_titles_may_hold_dots_and_signs(make, stub) -> None:
    workflow = stub.graph()
    workflow["2"]["_meta"]["title"] = "v1.5 = my work"
    (job,) = make(Request(sets=["v1.5 = my work.text=x = y"]), workflow)
    assert job.values == {("2", "text"): "x = y"}


def test_what_does_not_fit_is_said_with_what_there_is_all_at_once(make, stub) -> None:
    workflow = stub.graph()
    workflow["4"] = {**workflow["2"], "_meta": {"title": "Work"}}
    sets = ["Wrok.seed=1", "Load.picture=2", "Work.seed=3", "nothing", "Save it.images=1"]
    with pytest.raises(JobError) as caught:
        make(Request(sets=sets, overs=["Load.image=/no/*.jpg", "Save it.filename_prefix=@/no/file"]), workflow)
    lines = str(caught.value).splitlines()
    assert lines[0] == "'Wrok.seed': no node has that title; there are: Load, Save it, Work"
    assert lines[1] == "'Load.picture': the node has no such input; it has: image"
    assert "2.seed or 4.seed" in lines[2]
    assert "expected" in lines[3]
    assert "no file" in lines[4]
    assert "/no/file" in lines[5]
    assert len(lines) == 6


def test_tables(make, tmp_path: Path, photos: Path) -> None:
    csv = tmp_path / "jobs.csv"
    csv.write_text(
        'name,Work.text,Work.seed,Load.image\nfirst,"a, b",3,photos/a.jpg\n,,,\n,c,,example.png\n', "utf-8-sig"
    )
    jobs = make(Request(table=csv, sets=["Work.seed=9"]))
    assert [job.name for job in jobs] == ["first", "row_0002", "row_0003"]
    assert jobs[0].values == {
        ("2", "seed"): 3,
        ("2", "text"): "a, b",
        ("1", "image"): LocalFile(tmp_path / "photos" / "a.jpg"),
    }
    assert jobs[1].values == {("2", "seed"): 9}
    assert jobs[2].values["1", "image"] == "example.png"
    lines = tmp_path / "jobs.jsonl"
    lines.write_text('{"Work.text": "", "Work.strength": 2}\n\n{"Work.tidy": true}\n')
    assert [job.values for job in make(Request(table=lines))] == [
        {("2", "text"): "", ("2", "strength"): 2},
        {("2", "tidy"): True},
    ]
    both = make(Request(table=csv, overs=["Work.strength=0|1"]))
    assert [job.name for job in both][:2] == ["first_0.0", "first_1.0"]


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [("t.csv", "Work.text\na,b\n", "more cells"), ("t.jsonl", "[1]", "not an object"), ("t.txt", "", "a table is")],
)
def test_tables_that_cannot_be_read(make, tmp_path: Path, name: str, text: str, why: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(JobError, match=why):
        make(Request(table=tmp_path / name))


def test_every_job_gets_its_own_seed_that_others_do_not_change(make, photos: Path) -> None:
    request = Request(overs=[f"Load.image={photos}/*.jpg"], seed=1)
    before = {job.name: job for job in make(request)}
    (photos / "aa.jpg").write_bytes(b"new")
    after = {job.name: job for job in make(request)}
    seeds = [job.values["2", "seed"] for job in after.values()]
    assert len(set(seeds)) == 3
    assert {name: after[name] for name in before} == before
    other = make(replace(request, seed=2))
    assert not {job.values["2", "seed"] for job in other} & set(seeds)
    (fixed,) = make(Request(sets=["Work.seed=5"], seed=1))
    assert fixed.values["2", "seed"] == 5


def test_seeds_are_none_that_the_input_refuses(make, stub) -> None:
    definitions = copy.deepcopy(stub.DEFINITIONS)
    definitions["Work"]["input"]["required"]["seed"][1]["max"] = 9
    jobs = make(Request(overs=["Work.text=" + "|".join("abcdef")], seed=1), definitions=definitions)
    assert problems(stub.graph(), jobs, definitions) == []
    assert len({job.values["2", "seed"] for job in jobs}) > 1


def test_keys_are_by_content_not_by_name(make, stub, photos: Path) -> None:
    (before,) = make(Request(sets=[f"Load.image={photos}/a.jpg"]))
    (photos / "z.jpg").write_bytes(b"a.jpg")
    assert make(Request(sets=[f"Load.image={photos}/z.jpg"]))[0].key == before.key
    (photos / "a.jpg").write_bytes(b"changed")
    assert make(Request(sets=[f"Load.image={photos}/a.jpg"]))[0].key != before.key
    (plain,), (same,), (other,) = (make(Request(sets=s)) for s in ([], ["Work.seed=1"], ["Work.seed=2"]))
    assert plain.graph(stub.graph(), {}) == same.graph(stub.graph(), {})
    assert other.key not in (plain.key, same.key)
    renamed = stub.graph()
    renamed["2"]["_meta"]["title"] = "Other"
    assert make(Request(), renamed)[0].key == plain.key


def test_the_same_job_is_done_once_and_the_same_name_is_told_apart(stub, photos: Path) -> None:
    (photos / "same.jpg").write_bytes(b"a.jpg")
    (photos / "A.png").write_bytes(b"other")
    jobs, left_out = make_jobs(stub.graph(), Request(overs=[f"Load.image={photos}"]), stub.DEFINITIONS, hash_of_file)
    assert left_out == 1
    assert [job.name for job in jobs] == ["A", f"a_{jobs[1].key[:8]}", "b", "c"]


def test_a_jobs_graph_has_its_values_and_leaves_the_workflow_alone(make, stub, photos: Path) -> None:
    workflow = stub.graph()
    (job,) = make(Request(sets=[f"Load.image={photos}/a.jpg", "Work.seed=4"]))
    graph = job.graph(workflow, {photos / "a.jpg": "folder/x.jpg"})
    assert graph["1"]["inputs"]["image"] == "folder/x.jpg"
    assert graph["2"]["inputs"]["seed"] == 4
    assert workflow == stub.graph()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a b/c", "a_b_c"),
        ("../..", "_"),
        ("con.txt", "_con.txt"),
        ("Häuser", "Häuser"),
        ("x" * 99, "x" * 80),
        ("図" * 99, "図" * 32),
        ("", "_"),
    ],
)
def test_names_are_plain(text: str, name: str) -> None:
    assert slug(text) == name


def test_hashes_are_those_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * 3_000_000)
    assert hash_of_file(tmp_path / "f") == hashlib.sha256(b"x" * 3_000_000).hexdigest()


def test_a_workflow_that_fits_has_no_problems(make, stub, photos: Path) -> None:
    jobs = make(Request(overs=[f"Load.image={photos}"], sets=["Work.tidy=no"]))
    assert problems(stub.graph(), jobs, stub.DEFINITIONS) == []


def test_everything_that_is_wrong_is_found(make, stub) -> None:
    workflow = stub.graph(strength="much", model="gone.safetensors", other=["9", 0])
    del workflow["2"]["inputs"]["text"]
    workflow["5"] = {"class_type": "Unknown", "inputs": {}}
    workflow["3"]["inputs"]["images"] = ["1", 1]
    workflow["6"] = {"class_type": "PreviewImage", "inputs": {"images": ["2", 3]}}
    found = problems(workflow, [Job("job")], stub.DEFINITIONS)
    assert found == [
        "the server has no node Unknown",
        "Work.text (node 2): nothing is given or linked",
        "Work.strength (node 2): 'much' is no number of type FLOAT",
        "Work.model (node 2): 'gone.safetensors' is none of the server's 2 (small.safetensors, big.safetensors)",
        "Work.other (node 2): it is linked to a node that is not there (['9', 0])",
        "Save it.images (node 3): it wants IMAGE, and is linked to MASK of LoadImage",
        "PreviewImage.images (node 6): it is linked to output 3 of Work, which has 1",
    ]
    silent = {number: node for number, node in stub.graph().items() if number != "3"}
    assert problems(silent, [], stub.DEFINITIONS) == ["the workflow has no node that saves or shows anything"]


def test_values_of_jobs_are_checked_together(make, stub, tmp_path: Path) -> None:
    table = tmp_path / "t.jsonl"
    rows = [{"Work.seed": -1}, {"Work.seed": True}, {"Work.text": 3}, {"Work.tidy": "maybe"}, {"Load.image": "no.png"}]
    table.write_text("\n".join(map(json.dumps, [*rows, *({"Work.strength": 2.5, "name": f"s{i}"} for i in range(5))])))
    found = problems(stub.graph(), make(Request(table=table)), stub.DEFINITIONS)
    assert found == [
        f"Work.seed (node 2): -1 is not between 0 and {2**64 - 1} (jobs: row_0001)",
        "Work.seed (node 2): True is no number of type INT (jobs: row_0002)",
        "Work.text (node 2): 3 is no text (jobs: row_0003)",
        "Work.tidy (node 2): 'maybe' is neither true nor false (jobs: row_0004)",
        "Load.image (node 1): 'no.png' is no file here and none of the server's inputs (jobs: row_0005)",
        "Work.strength (node 2): 2.5 is not between 0.0 and 2.0 (jobs: s0)",
    ]


def test_what_all_jobs_set_need_not_be_right_in_the_file(make, stub, photos: Path) -> None:
    workflow = stub.graph()
    workflow["1"]["inputs"]["image"] = "not on this server.png"
    jobs = make(Request(overs=[f"Load.image={photos}"]))
    assert problems(workflow, jobs, stub.DEFINITIONS) == []
    (found,) = problems(workflow, [*jobs, Job("other")], stub.DEFINITIONS)
    assert "not on this server.png" in found
