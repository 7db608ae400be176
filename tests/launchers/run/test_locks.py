"""Which change of a recipe concerns what of a run, and what has to be done anew."""

import json
from pathlib import Path

import pytest
from tiny_run import ALL, checkpoint, do, done, networks_of

from launchers.run import locks
from launchers.run.folder import RunFolder
from launchers.run.networks import Networks
from launchers.run.sequence import begins_on_workers, open_folder
from launchers.run.stages import STAGES
from sbf_dist.errors import UserError


def weights(networks: Networks) -> set[str]:
    return {path.stem for path in networks.folder.root.glob("weights/*")}


@pytest.fixture(params=[True, False], ids=["results say what was read", "older results"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Networks:
    """A run of which all stages are done."""
    networks = networks_of(tmp_path)
    open_folder(networks, None)
    do(networks, *ALL, note=request.param)
    return networks


def changed(run: Networks, *overrides: str) -> Networks:
    return networks_of(run.folder.runs, *overrides)


def test_every_setting_of_a_runs_identity_is_read_by_some_product(tmp_path: Path) -> None:
    for more in ([], ["compress.rounds=2"], ["baselines=null"]):
        networks = networks_of(tmp_path, *more)
        values = locks.values_of(networks.recipe.identity())
        reads = [key for s in STAGES for product in s.products(networks) for key in product.reads]
        assert values.keys() - locks.read_by(values, reads, all_keys=True).keys() == {
            "name",
            "data.threads",  # which no result depends on
        }


@pytest.mark.parametrize(
    ("finished", "until", "begins"),
    [
        ([], "export", True),
        ([], "prepare", False),
        (["prepare", "teachers", "pseudo-labels"], "export", False),  # to compress may take hours
        (["prepare", "teachers", "pseudo-labels", "compress"], "export", True),
        (ALL, "export", False),
    ],
)
def test_workers_begin_early_where_they_are_needed_first(
    tmp_path: Path, finished: list[str], until: str, begins: bool
) -> None:
    networks = networks_of(tmp_path)
    do(networks, *finished)
    assert begins_on_workers(networks, until) is begins


def test_teachers_that_are_given_keep_the_pseudo_labels_waiting_for_nothing(tmp_path: Path) -> None:
    (tmp_path / "w").touch()
    given = [
        f"teachers.{n}.{key}" for n in (0, 1) for key in ("training=null", f"weights={tmp_path}/w")
    ]
    networks = networks_of(tmp_path, *given, "baselines=null")
    assert begins_on_workers(networks, "pseudo-labels")
    assert not begins_on_workers(networks, "teachers")


def test_products_need_what_is_there_before_them(tmp_path: Path) -> None:
    for more in ([], ["compress.rounds=2"]):
        known: set[str] = set()
        for stage in STAGES:
            for product in stage.products(networks_of(tmp_path, *more)):
                assert set(product.needs) <= known, product
                known.add(product.name)


def test_the_same_recipe_leaves_everything_as_it_is(run: Networks) -> None:
    before = set(run.folder.root.rglob("*"))
    open_folder(run, None)
    assert set(run.folder.root.rglob("*")) == before


def test_a_change_is_refused_with_what_is_to_be_done_again_and_why(run: Networks) -> None:
    with pytest.raises(UserError) as caught:
        open_folder(changed(run, "compress.macs=0.25"), None)
    assert str(caught.value) == (
        f"run folder {run.folder.root}: compress was done with compress.macs = 0.5, the recipe "
        "says 0.25; give --again compress (which repeats compress, distill, evaluate, export) or "
        "another name (name=…)"
    )
    assert done(run) == ALL
    with pytest.raises(UserError, match="give --again compress"):
        open_folder(changed(run, "compress.macs=0.25"), "distill")


def test_another_budget_leaves_the_teachers(run: Networks) -> None:
    open_folder(changed(run, "compress.macs=0.25"), "compress")
    assert done(run) == ["prepare", "teachers", "pseudo-labels"]
    assert weights(run) == {"one", "two", "dense-labels"}
    open_folder(changed(run, "compress.macs=0.25"), None)  # it is the folder's recipe now
    with pytest.raises(UserError, match="teachers was done with"):
        open_folder(changed(run, "teachers.0.training.steps=99"), None)


def test_more_steps_for_one_teacher_concern_that_teacher_and_what_depends_on_it(
    run: Networks,
) -> None:
    open_folder(changed(run, "teachers.1.training.steps=20"), "teachers")
    # The student is compressed from the other one.
    assert done(run) == ["prepare", "compress"]
    assert weights(run) == {"one", "dense-labels", "zeroed", "sbf-one-shot", "sbf-labels"}


def test_more_steps_for_the_student_leave_the_baseline(run: Networks) -> None:
    open_folder(changed(run, "distill.training.steps=20"), "distill")
    assert done(run) == ["prepare", "teachers", "pseudo-labels", "compress"]
    assert "sbf-labels" in weights(run)
    assert "sbf-distilled" not in weights(run)


def test_the_choice_of_pseudo_labels_concerns_the_student_alone(run: Networks) -> None:
    open_folder(changed(run, "pseudo_labels.threshold=0.5"), "distill")
    assert done(run) == ["prepare", "teachers", "pseudo-labels", "compress"]


def test_without_a_change_a_stage_and_all_after_it_are_done_anew(run: Networks) -> None:
    open_folder(run, "pseudo-labels")
    assert done(run) == ["prepare", "teachers"]
    assert weights(run) == {"one", "two", "dense-labels"}
    assert not run.folder.pseudo_labels.exists()


def test_a_change_of_later_stages_and_an_earlier_one_again(run: Networks) -> None:
    open_folder(changed(run, "distill.training.steps=20"), "compress")
    assert done(run) == ["prepare", "teachers", "pseudo-labels"]


def test_a_baseline_that_is_added_or_left_out(run: Networks) -> None:
    open_folder(changed(run, "baselines=null"), "evaluate")
    assert done(run) == ["prepare", "teachers", "pseudo-labels", "compress", "distill"]
    with pytest.raises(
        UserError, match=r"teachers was done with\S* baselines.steps.* says 30; give"
    ):
        open_folder(changed(run, "baselines.steps=30"), None)


def test_what_was_not_begun_is_free_to_change(tmp_path: Path) -> None:
    networks = networks_of(tmp_path)
    open_folder(networks, None)
    do(networks, "prepare", "teachers")
    others = ("compress.macs=0.25", "distill.targets=live", "distill.training.steps=20")
    assert open_folder(changed(networks, *others), None) == []
    assert done(networks) == ["prepare", "teachers"]


def test_a_stage_that_was_cut_is_locked_by_the_folders_recipe(tmp_path: Path) -> None:
    networks = networks_of(tmp_path)
    open_folder(networks, None)
    do(networks, "prepare")
    networks.teachers[0].weights.parent.mkdir()
    networks.teachers[0].weights.touch()
    with pytest.raises(UserError, match=r"with teachers\.0\.training\.steps = 10, the recipe says"):
        open_folder(changed(networks, "teachers.0.training.steps=20"), None)
    open_folder(changed(networks, "teachers.0.training.steps=20"), "teachers")
    assert weights(networks) == set()


def test_weights_that_were_given_are_never_removed(tmp_path: Path) -> None:
    given = tmp_path / "given.safetensors"
    given.touch()
    networks = networks_of(tmp_path, "teachers.0.training=null", f"teachers.0.weights={given}")
    open_folder(networks, None)
    do(networks, *ALL)
    open_folder(networks, "prepare")
    assert given.exists()


def test_what_workers_and_tracking_say_locks_nothing(run: Networks) -> None:
    open_folder(changed(run, "workers.cpus=2", "tracking.experiment=other"), None)
    assert done(run) == ALL


def test_a_recipe_is_not_the_folders_before_its_images_are_prepared(tmp_path: Path) -> None:
    networks = networks_of(tmp_path)
    open_folder(networks, None)
    assert not networks.folder.recipe.exists()
    do(networks, "prepare")
    assert json.loads(networks.folder.recipe.read_text()) == networks.recipe.identity()


def test_what_changes_no_result_needs_no_stage_to_be_repeated(run: Networks) -> None:
    changes = (
        "distill.training.log_every=3",
        "teachers.0.training.checkpoint_every=7",
        "teachers.1.training.skip_bad_steps=3",
        "baselines.compile=true",
    )
    assert open_folder(changed(run, *changes), None) == []
    assert done(run) == ALL


def test_a_longer_training_that_was_cut_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    networks = networks_of(tmp_path)
    do(networks, "prepare", "teachers", "pseudo-labels", "compress")
    kept = checkpoint(networks, "distill")
    (line,) = open_folder(changed(networks, "distill.training.steps=20"), None)
    assert line == (
        "distill.training.steps is 20 instead of 10: the training resumes from its last "
        "checkpoint, with the learning rates of a training of 20"
    )
    assert kept.exists()
    assert open_folder(changed(networks, "distill.training.steps=20"), None) == []
    baseline = changed(networks, "distill.training.steps=20", "baselines.steps=40")
    with pytest.raises(UserError, match="give --again teachers"):
        open_folder(baseline, None)
    with pytest.raises(UserError, match=r"distill was begun with .*steps = 20, the recipe says 15"):
        open_folder(changed(networks, "distill.training.steps=15"), None)


def test_a_training_that_was_cut_goes_on_with_other_passes(tmp_path: Path) -> None:
    networks = networks_of(tmp_path)
    do(networks, "prepare", "teachers", "pseudo-labels", "compress")
    kept = checkpoint(networks, "distill")
    smaller = ("distill.training.images_at_once=8",)
    both = (*smaller, "distill.training.steps=20")
    with pytest.raises(UserError, match="give --again teachers"):  # which are done
        open_folder(changed(networks, "teachers.0.training.images_at_once=8", *smaller), None)
    with pytest.raises(UserError, match=r"distill was begun with .*batch_size = 64"):
        open_folder(changed(networks, "distill.training.batch_size=32", *smaller), None)
    assert len(open_folder(changed(networks, *both), None)) == 2
    (line,) = open_folder(changed(networks, both[1], "distill.training.accumulation=2"), None)[:1]
    assert line == (
        "distill.training.accumulation is 2 instead of 1: the training resumes from its last "
        "checkpoint, with other passes over the images of a step"
    )
    assert kept.exists()


def test_a_longer_training_that_was_done_goes_on_from_its_end(run: Networks) -> None:
    kept = checkpoint(run, "distill")
    longer = changed(run, "distill.training.steps=20")
    with pytest.raises(UserError) as caught:
        open_folder(longer, None)
    assert (
        "give --again distill (which repeats distill, evaluate, export), which resumes from its "
        "end, or another name"
    ) in str(caught.value)
    (line,) = open_folder(longer, "distill")
    assert "resumes" in line
    assert kept.exists()
    assert "sbf-distilled" not in weights(run)


def test_a_longer_training_that_starts_from_other_weights_begins_anew(run: Networks) -> None:
    kept = checkpoint(run, "distill")
    changes = ("distill.training.steps=20", "compress.macs=0.25")
    assert open_folder(changed(run, *changes), "compress") == []
    assert not kept.exists()


def test_a_repeated_training_begins_anew(run: Networks) -> None:
    kept = checkpoint(run, "distill")
    assert open_folder(run, "distill") == []
    assert not kept.exists()


def test_a_removal_that_is_cut_leaves_no_stage_without_its_basis(
    run: Networks, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = RunFolder.remove
    for allowed in range(40):
        left = [allowed]

        def cut(folder: RunFolder, path: Path, left: list[int] = left) -> None:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            remove(folder, path)

        monkeypatch.setattr(RunFolder, "remove", cut)
        try:
            open_folder(run, "teachers")
        except KeyboardInterrupt:
            finished = done(run)
            assert finished == ALL[: len(finished)]
        else:
            assert done(run) == ["prepare"]
            return
    pytest.fail("forty files, and still not all")


@pytest.mark.parametrize(
    ("key", "pattern", "reads"),
    [
        ("seed", "seed", True),
        ("data.image_size", "data", True),
        ("data.image_size", "data.image", False),
        ("teachers.0.name", "teachers.*.name", True),
        ("teachers.0.training.optimizer.name", "teachers.*.name", False),
        ("teachers.10.name", "teachers.1", False),
    ],
)
def test_a_key_is_read_by_its_own_name_and_by_its_sections(key, pattern, reads) -> None:
    assert bool(locks.read_by({key: 1}, [pattern])) is reads
