import json
import typing
from pathlib import Path

import pytest
import yaml
from minimal_recipe import MINIMAL, refusal

from sbf_dist import recipe, settings
from sbf_dist.compression.planning.criteria import CRITERIA
from sbf_dist.recipe import Recipe

RECIPES = Path(__file__).parents[1] / "recipes"
SHIPPED = sorted(set(RECIPES.glob("*.yaml")) - set(RECIPES.glob("compare-*.yaml")))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "tiny.yaml").write_text(MINIMAL)
    return tmp_path / "tiny.yaml"


@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda path: path.name)
def test_shipped_recipes_load_and_their_runs_are_called_as_their_files(shipped):
    assert recipe.load(shipped).name == shipped.stem


def test_defaults_are_filled_in(path):
    loaded = recipe.load(path)
    assert loaded.compress.macs == 0.5
    assert loaded.teachers[0].training.optimizer.lr == 0.1
    assert loaded.teachers[1].weights == Path("two.safetensors")
    assert loaded.baselines is None
    assert loaded.workers.count == 1


def test_trainings_are_found_by_their_place(path):
    loaded = recipe.load(path, ["baselines={steps: 7}"])
    assert {where: training.steps for where, training in loaded.trainings().items()} == {
        "teachers.0.training": 100,
        "distill.training": 50,
        "baselines": 7,
    }


def test_labels_are_chosen_by_number_by_share_or_by_a_list_but_once(path):
    assert recipe.load(path, ["data.labelled_per_class=10"]).data.labelled_per_class == 10
    assert recipe.load(path, ["data.labelled_per_class=0.1"]).data.labelled_per_class == 0.1
    assert recipe.load(path, ["data.split=ten.txt"]).data.split == Path("ten.txt")
    refused = refusal(path, "data.split=ten.txt", "data.labelled_per_class=10")
    assert refused.endswith(
        "data: split = 'ten.txt' and labelled_per_class = 10 both choose the labelled images; give "
        "one of them, set the other to null"
    )


def test_a_source_of_known_content_says_what_root_must_be(path):
    assert recipe.load(path).data.expected is None
    assert recipe.load(path, ["data.source=folder", "data.root=x"]).data.expected is None
    loaded = recipe.load(path, ["data.source=tiny-imagenet", "data.root=x"])
    assert loaded.data.expected == "tiny-imagenet"


@pytest.mark.parametrize(
    "budget", [("params", 0.3), ("params", 1_000_000), ("latency", 0.6), ("latency_ms", 12.5)]
)
def test_another_budget_takes_the_place_of_multiply_adds(path, budget):
    key, value = budget
    loaded = recipe.load(path, ["compress.macs=null", f"compress.{key}={value}"])
    assert loaded.compress.macs is None
    assert getattr(loaded.compress, key) == value


@pytest.mark.parametrize("written", ["2000000000", "2.0e9", "2e9"])
def test_multiply_adds_may_be_a_number(path, written):
    assert recipe.load(path, [f"compress.macs={written}"]).compress.macs == 2e9


def test_what_a_plan_can_be_asked_for(path):
    asked = "{criterion: taylor, keep: [conv, stages.0.*], round_to: 8, rounds: 3}"
    content = yaml.safe_load(MINIMAL)
    content["compress"] |= yaml.safe_load(asked)
    path.write_text(json.dumps(content))
    compress = recipe.load(path).compress
    assert (compress.criterion, compress.round_to, compress.rounds) == ("taylor", 8, 3)
    assert compress.keep == ["conv", "stages.0.*"]
    plain = recipe.load(path, ["compress={teacher: one, macs: 0.5}"]).compress
    assert (plain.criterion, plain.round_to, plain.rounds) == ("reconstruction", 1, 1)
    assert (plain.keep, plain.between) == ([], None)


def test_criteria_are_those_of_the_library():
    assert typing.get_args(settings.Criterion) == CRITERIA


def test_a_recipe_survives_json(path):
    loaded = recipe.load(path, ["data.validation=0.25", "data.root=/tmp/x"])
    again = Recipe.model_validate(json.loads(json.dumps(loaded.model_dump(mode="json"))))
    assert again == loaded
    assert again.digest() == loaded.digest()


# --- messages ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("compress.mac=0.5", "compress.mac is not a known key; did you mean 'macs'?"),
        ("distil.training.steps=5", "distil is not a known key; did you mean 'distill'?"),
        ("teachers.1.wieght=2", "teachers.1.wieght is not a known key; did you mean 'weight'?"),
        ("teachers.0.training.optimiser={}", "did you mean 'optimizer'?"),
        ("distill.training.optimizer.learning_rate=1", "distill.training.optimizer.learning_rate"
         " is not a known key; known are name, lr, body_lr_share, weight_decay, momentum, betas"),
        ("workers.qqq=1", "workers.qqq is not a known key; known are count, cpus, gpus, max_fail"),
    ],
)  # fmt: skip
def test_an_unknown_key_names_the_nearest_or_all(path, override, message):
    assert message in refusal(path, override)


def test_a_key_that_is_wrongly_written_comes_before_the_one_that_is_missing_for_it(path):
    path.write_text(MINIMAL.replace("compress:", "compres:"))
    assert "compres is not a known key; did you mean 'compress'?" in refusal(path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("compress.macs=1.5", "compress.macs = 1.5 must be a share in (0, 1] or a whole number"),
        ("compress.macs=0", "compress.macs = 0 must be a share in (0, 1] or a whole"),
        ("compress.macs=.nan", "compress.macs = nan must be a finite number"),
        ("compress={teacher: one, params: -4}", "compress.params = -4 must be a share in (0, 1]"),
        ("compress.params=0.5", "compress: give exactly one of macs, params, latency and latency_ms"
         ", not macs = 0.5 and params = 0.5 (set the others to null)"),
        ("compress.criterion=l3", "compress.criterion = 'l3' must be 'reconstruction', 'l1', 'l2', "
         "'bn_scale', 'taylor' or 'random'"),
        ("compress.keep=layer1", "compress.keep = 'layer1' must be a valid list"),
        ("compress.keep=[3]", "compress.keep.0 = 3 must be a valid string"),
        ("compress.round_to=0", "compress.round_to = 0 must be greater than or equal to 1"),
        ("compress.rounds=0", "compress.rounds = 0 must be greater than or equal to 1"),
        ("compress={teacher: one, latency: 0.5, rounds: 2}",
         "compress: rounds = 2 needs a budget of macs or params; for a time it must be 1"),
        ("compress={teacher: one, macs: 0.5, rounds: 2, between: bn_relu}", "compress: rounds = 2 "
         "needs between = null: layers with bn_relu cannot be shrunk again"),
        ("compress.between=relu", "compress.between = 'relu' must be 'bn_relu'"),
        ("compress.macs=half", "compress.macs = 'half' must be a valid number"),
        ("compress.transform_size=4", "compress: transform_size = 4 must be odd"),
        ("compress.macs=null",
         "compress: give exactly one of macs, params, latency and latency_ms; nothing is given"),
        ("compress.latency=0.6", "compress: give exactly one of macs, params, latency and "
         "latency_ms, not macs = 0.5 and latency = 0.6 (set the others to null)"),
        ("compress={teacher: one, latency: 1.5}",
         "compress.latency = 1.5 must be less than or equal to 1"),
        ("compress={teacher: one, latency_ms: 0}", "compress.latency_ms = 0 must be greater than"),
        ("compress.latency_batch=0", "compress.latency_batch = 0 must be greater than or equal"),
        ("compress.teacher=three", "compress.teacher = 'three' must be one of one, two"),
        ("seed=-1", "seed = -1 must be greater than or equal to 0"),
        ("seed=1.5", "seed = 1.5 must be a valid integer"),
        ("name=a/b", "name = 'a/b' must be letters, digits, '_', '-' and '.'"),
        ("name=..", "name = '..' must be letters"),
        ("name=3", "name = 3 must be a valid string"),
        ("teachers.0.name=../x", "teachers.0.name = '../x' must be letters"),
        ("teachers.1.name=one", "teachers: names must differ, they are one, one"),
        ("teachers.0.training=null", "teachers.0: give either training or weights, or pretrained"),
        ("teachers.0.pretrained=true", "teachers.0: pretrained = True needs a model of timm or"),
        ("teachers.0.weights_key=ema", "teachers.0: weights_key or weights_prefix = 'ema'"),
        ("teachers.0.classes=x.txt", "teachers.0: classes = 'x.txt' is for a teacher that is not"),
        ("teachers.0.views=3", "teachers.0.views = 3 must be 1 or 2"),
        ("distill.training.optimizer.body_lr_share=0", "distill.training.optimizer.body_lr_share"),
        ("teachers.0.weights=x", "teachers.0: give either training or weights"),
        ("teachers=[]", "teachers = [] must have at least 1 item"),
        ("teachers=one", "teachers = 'one' must be a valid list"),
        ("teachers.0=one", "teachers.0 = 'one' must be a mapping of keys to values"),
        ("data=digits", "data = 'digits' must be a mapping of keys to values"),
        ("data.source=mnist", "data.source = 'mnist' must be 'digits', 'photos', 'folder',"),
        ("data.source=imagenet", "data: root must name a folder of images for source: imagenet"),
        ("data.source=folder", "data: root must name a folder of images for source: folder"),
        ("data.root=[1]", "data.root = [1] must be a path, or an address as s3://BUCKET/FOLDER"),
        ("data.root=ftp://host/x", "data.root: ftp://host/x: ftp:// is not known; s3://, gs://"),
        ("data.root=s3:///x", "data.root: s3:///x: names no bucket, as in s3://BUCKET/FOLDER"),
        ("data.root=s3://me:secret@b/x", "data.root: s3://***@b/x: credentials do not belong"),
        ("data.unlabelled=x://y", "data.unlabelled: x://y: x:// is not known"),
        ("data.root=s3://b/x", "data: root = 's3://b/x' must be a folder for source: digits"),
        ("data.cache_gb=0", "data.cache_gb = 0 must be greater than 0"),
        ("data.validation=-3", "data.validation: -3 must be a number of images or a share"),
        ("data.validation=1.0", "data.validation: 1.0 must be a number of images or a share"),
        ("data.validation=true", "data.validation: True must be a number of images"),
        ("data.validation=some", "data.validation: 'some' must be a number of images"),
        ("data.labelled_per_class=0", "data.labelled_per_class: 0 must be a number of images or"),
        ("data.labelled_per_class=1.0", "data.labelled_per_class: 1.0 must be a number of images"),
        ("data.image_size=4", "data.image_size = 4 must be greater than or equal to 8"),
        ("data.mean=[0.5, 0.5]", "data.mean.2 is missing"),
        ("data.std=[0.5, 0, 0.5]", "data.std.1 = 0 must be greater than 0"),
        ("data.crop=2", "data.crop = 2 must be less than or equal to 1"),
        ("data.augmentation={min_scale: 0.9, max_scale: 0.8}",
         "data.augmentation: min_scale = 0.9 must not be above max_scale = 0.8"),
        ("data.augmentation={min_ratio: 2}",
         "data.augmentation: min_ratio = 2.0 must not be above max_ratio = 1.33"),
        ("data.augmentation.crop=random", "data.augmentation.crop = 'random'"),
        ("data.augmentation.rand_augment=17", "data.augmentation.rand_augment = 17 must be less"),
        ("data.augmentation.magnitude=31", "data.augmentation.magnitude = 31 must be less"),
        ("data.augmentation.mixup=-1", "data.augmentation.mixup = -1 must be greater"),
        ("data.cache=disk", "data.cache = 'disk'"),
        ("data.augmentation.rotate=200", "data.augmentation.rotate = 200 must be less than or"),
        ("workers.count=0", "workers.count = 0 must be greater than or equal to 1"),
        ("workers.count=[0, 2]", "workers.count = [0, 2] must be greater than or equal to 1"),
        ("workers.count=[4, 2]", "workers.count = [4, 2] must be a number, or [least, most]"),
        ("workers.count=[3, 4]", "teachers.0.training.batch_size = 64 must be a multiple of "
         "workers x accumulation = 3"),
        ("workers.count=3", "teachers.0.training.batch_size = 64 must be a multiple of workers x "
         "accumulation = 3: 63 or 66, or 1, 2, 4, 8, 16, 32 workers"),
        ("workers.count=100", "teachers.0.training.batch_size = 64 must be a multiple of workers x "
         "accumulation = 100: 100, or 8, 16, 32, 64 workers"),
        ("distill.training.accumulation=5", "distill.training.batch_size = 64 must be a multiple "
         "of workers x accumulation = 5: 60 or 65"),
        ("distill.training={steps: 9, accumulation: 2, images_at_once: 8}", "distill.training: "
         "accumulation = 2 and images_at_once = 8 both say how many passes a step takes; give one"),
        ("distill.training.warmup=50", "distill.training: warmup = 50 must be less than steps ="),
        ("distill.training={steps: 50, warmup: 10, warmup_epochs: 1}",
         "distill.training: warmup = 10 and warmup_epochs = 1.0 both say how long the warm-up is"),
        ("distill.training={}", "distill.training: give either steps or epochs, and set the other"),
        ("distill.training.epochs=2", "distill.training: give either steps or epochs, and set the"),
        ("distill.training={epochs: 2, warmup_epochs: 2}", "distill.training: warmup_epochs = 2.0 "
         "must be less than epochs = 2"),
        ("distill.training.ema=1", "distill.training.ema = 1 must be less than 1"),
        ("distill.training.label_smoothing=1", "distill.training.label_smoothing = 1 must be less"),
        ("distill.training.milestones=[1.5]", "distill.training.milestones.0 = 1.5 must be less"),
        ("distill.training.sync_batchnorm=true", "distill.training.sync_batchnorm = True needs "
         "GPUs, workers.gpus is 0; set it to false"),
        ("distill.training.optimizer.name=lamb", "distill.training: zero_stage = 1 cannot be "
                                                 "combined with optimizer.name = lamb, which "
                                                 "scales each layer's step as a whole;"),
        ("distill.training={steps: 5, compile: true, zero_stage: 3}", "distill.training: "
                                                                      "zero_stage = 3 cannot be "
                                                                      "combined with compile = "
                                                                      "True"),
        ("distill.targets=hard", "distill.targets = 'hard' must be 'auto', 'stored' or"),
        ("distill.label_weight=-1", "distill.label_weight = -1 must be a number of at least 0"),
        ("distill.label_weight=[0.1, 0.2, 0.3]", "distill.label_weight = [0.1, 0.2, 0.3] must be"),
        ("distill.consistency={weight: [1, .inf]}", "distill.consistency.weight = [1, inf] must"),
        ("distill.consistency={threshold: 1}", "distill.consistency.threshold = 1 must be less"),
        ("distill.consistency={target: teacher}", "distill.consistency.target = 'teacher' must"),
        ("distill.consistency={strong: {mixup: 0.2}}", "distill.consistency: strong must not set"),
        ("distill.labels_last={share: 1}", "distill.labels_last.share = 1 must be less than 1"),
        ("distill={training: {steps: 9, schedule: step}, labels_last: {share: 0.1}}", "distill: "
         "labels_last needs training.schedule = cosine, not step"),
        ("distill={training: {steps: 9, warmup: 5}, labels_last: {share: 0.5}}", "distill: labels_"
         "last leaves 5 of 9 steps before, which must be more than training.warmup = 5"),
        ("distill={training: {epochs: 10, warmup_epochs: 5}, labels_last: {share: 0.6}}",
         "distill: labels_last leaves 4 of 10 epochs before, which must be more than training."
         "warmup_epochs = 5"),
        ("distill.training.precision=fp16", "distill.training.precision = 'fp16' needs GPUs, "
         "workers.gpus is 0; take 'bf16' or 'fp32'"),
        ("baselines={steps: 5, precision: fp16}", "baselines.precision = 'fp16' needs GPUs"),
        ("distill={training: {steps: 9}, labelled_share: 0, teacher_weight: 0}",
         "distill: teacher_weight = 0 and labelled_share = 0 leave nothing to train on; one of "
         "them must be above 0, or set consistency or features"),
        ("distill={training: {steps: 9}, label_weight: [0, 0], teacher_weight: 0, consistency: "
         "{weight: 0}}", "distill: teacher_weight = 0 and label_weight = [0.0, 0.0] leave nothing"),
        ("distill={training: {steps: 9, compile: true}, features: {}}", "distill: features "
                                                                        "cannot be combined with "
                                                                        "training.compile = True"),
        ("distill.training.zero_stage=4", "distill.training.zero_stage = 4 must be 0, 1, 2 or 3"),
        ("compress.removal=maybe", "compress.removal = 'maybe' must be a valid number or "
                                   "'auto'"),
        ("compress.removal=1.5", "compress.removal = 1.5 must be less than or equal to 1 or "
                                 "'auto'"),
        ("pseudo_labels.temperature=0", "pseudo_labels.temperature = 0 must be greater than 0 or "
                                        "'fit'"),
        ("pseudo_labels.temperature=null", "pseudo_labels.temperature = None must be a valid "
                                           "number or 'fit'"),
        ("tracking.experiment=''", "tracking.experiment = '' must have at least 1 character"),
        (f"tracking.experiment={501 * 'a'}", f"tracking.experiment = '{199 * 'a'}… must have at "
                                             "most 500 characters"),
        ("distill.training.precision=tf32", "distill.training.precision = 'tf32' must be 'fp32'"),
        ("distill.training.optimizer.lr=.inf", "distill.training.optimizer.lr = inf must be a f"),
        ("distill.training.optimizer.lr=.nan", "distill.training.optimizer.lr = nan must be a f"),
        ("pseudo_labels.threshold=1", "pseudo_labels.threshold = 1 must be less than 1"),
        ("distill.labelled_share=1.01", "distill.labelled_share = 1.01 must be less than or eq"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_reported_with_its_key_and_what_would_be_right(path, override, message):
    refused = refusal(path, override)
    assert refused.startswith(f"recipe {path}: {message}"), refused


@pytest.mark.parametrize("validation", ["5", "0.2", "null"])
def test_validation_is_a_number_of_images_or_a_share(path, validation):
    loaded = recipe.load(path, [f"data.validation={validation}"])
    assert loaded.data.validation == yaml.safe_load(validation)
    assert type(loaded.data.validation) is type(yaml.safe_load(validation))


@pytest.mark.parametrize("key", ["name", "data", "teachers", "compress", "distill"])
def test_what_a_recipe_must_have_is_named_when_it_is_missing(path, key):
    content = yaml.safe_load(MINIMAL)
    del content[key]
    path.write_text(json.dumps(content))
    assert refusal(path) == f"recipe {path}: {key} is missing"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name: [", "is not YAML: while parsing"),
        (b"a: b: c", "is not YAML: mapping values are not allowed here"),
        (b"\xff\xfe\x00", "is not YAML"),
        (b"- 1\n- 2\n", "must be a mapping of keys to values"),
        (b"", "must be a mapping of keys to values"),
        (b"just text", "must be a mapping of keys to values"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(path, content, message):
    path.write_bytes(content)
    assert f"recipe {path} {message}" in refusal(path)


def test_a_recipe_that_is_missing_or_a_folder_is_refused(tmp_path):
    assert refusal(tmp_path / "x.yaml") == f"recipe {tmp_path / 'x.yaml'} does not exist"
    assert f"recipe {tmp_path} is not YAML" in refusal(tmp_path)


def test_every_field_says_what_it_is_for():
    def sections(model):
        for name, field in model.model_fields.items():
            inner = [
                a
                for a in (field.annotation, *getattr(field.annotation, "__args__", ()))
                if isinstance(a, type) and issubclass(a, recipe.Section)
            ]
            if not inner:
                assert field.description, f"{model.__name__}.{name}"
            for section in inner:
                assert section.__doc__
                sections(section)

    sections(Recipe)


def test_images_are_mixed_in_pairs(path):
    odd = ("workers.count=2", "distill.training.batch_size=36", "distill.training.accumulation=2")
    assert recipe.load(path, odd).data.augmentation.mixes is False
    for name in ("mixup", "cutmix"):
        refused = refusal(path, *odd, f"data.augmentation.{name}=0.2")
        assert refused.endswith(
            "distill.training.batch_size = 36 is 9 images for a worker at once; mixup and cutmix "
            "need an even number: 32 or 40, or 1, 3, 9 workers"
        )


def test_images_lie_in_a_folder_or_at_an_address(path):
    folder = recipe.load(path, ["data.source=folder", "data.root=some/where"])
    stored = recipe.load(path, ["data.source=folder", "data.root=s3://bucket/set/"])
    assert folder.data.root == Path("some/where")
    assert stored.data.root == "s3://bucket/set"
    for one in (folder, stored):
        assert Recipe.model_validate(one.model_dump(mode="json")) == one
    assert folder.identity()["data"]["root"] == "some/where"
    assert stored.identity()["data"]["root"] == "s3://bucket/set"
