"""Manifests of diffusion pipelines: folders of images are encoded once, and every step reads what that made."""

import shutil
from pathlib import Path

import pytest

from onelayer.compiler.denoising.encoded import EncodedImages
from onelayer.compiler.errors import InputError
from onelayer.runtime.manifest.manifest import load_manifest
from onelayer.runtime.pipeline.plan import plan
from onelayer.runtime.pipeline.run import run
from onelayer.runtime.store.store import ArtifactStore
from scripts.sweep.encoded_pipelines import EncodedPipeline

pytestmark = pytest.mark.filterwarnings("ignore")
MANIFEST = """
version: 1
model: {path: pipe}
images: {resolution: 32, instance_prompt: a photo of sks dog, class_prompt: a photo of dog, class_data: class}
emulator: {keep_bytes: 0.25, factor_dtype: nf4, calibration: {data: photos, samples: 4}, refine: none}
train: {lora: {r: 2, alpha: 2}, args: {max_steps: 1, per_device_train_batch_size: 1, learning_rate: 1.0e-2}}
polish: {steps: 1, batch_size: 1}
samples: {prompts: [a dog on the moon], steps: 1, resolution: 32}
tasks:
  dog: {train: photos, test: held, merge: true}
output: results
"""
STEPS = [
    "encode 1",
    "encode 2",
    "compile",
    "dog.train",
    "dog.correct",
    "dog.polish",
    "dog.merge",
    "dog.evaluate",
    "dog.samples",
]


@pytest.fixture
def project(flux: EncodedPipeline, tmp_path: Path) -> Path:
    root = tmp_path / "project"
    shutil.copytree(flux.pipeline, root / "pipe")
    for name, of in (("photos", "photos"), ("class", "class"), ("held", "photos")):
        shutil.copytree(flux.pipeline.parent / of, root / name)
    (root / "held" / "0.png").unlink()
    (root / "m.yaml").write_text(MANIFEST)
    return root


def test_a_pipeline_goes_through_every_step_once(project: Path, tmp_path: Path) -> None:
    store, manifest = ArtifactStore(tmp_path / "store"), load_manifest(project / "m.yaml")
    planned = plan(manifest, store)
    assert [step.name for step in planned.steps] == STEPS
    assert all(step.peak_bytes for step in planned.steps if step.kind in ("compile", "train", "polish"))
    made = {step.name: step for step in run(manifest, store).steps}
    assert list(made) == STEPS
    assert {step.state for step in made.values()} == {"ran"}
    key = made["encode 1"].key
    assert key is not None
    encoded = EncodedImages.open(store.payload(key))
    assert (len(encoded.numbers(is_class=False)), len(encoded.numbers(is_class=True))) == (3, 2)
    assert (tmp_path / "project/results/dog-samples/0.png").is_file()
    assert {step.state for step in plan(manifest, store).steps} == {"cached"}
    (project / "held" / "1.txt").write_text("a dog")
    again = {step.name: step.state for step in plan(load_manifest(project / "m.yaml"), store).steps}
    assert {name for name, state in again.items() if state == "to run"} == {"encode 2", "dog.evaluate"}
    (project / "pipe/scheduler/scheduler_config.json").write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler"}')
    again = {step.name: step.state for step in plan(load_manifest(project / "m.yaml"), store).steps}
    assert again["encode 1"] == "to run"


def test_the_example_loads(tmp_path: Path) -> None:
    example = Path(__file__).parents[3] / "manifests" / "flux-8gb.yaml"
    for folder in ("flux-dev", "data/dogs", "data/sks.train", "data/sks.test"):
        (tmp_path / folder).mkdir(parents=True)
    manifest = load_manifest(shutil.copy(example, tmp_path))
    assert manifest.images is not None
    assert manifest.images.class_data == str(tmp_path / "data/dogs")
    assert manifest.limit("sks") == 3


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{path: pipe}", "{path: org/name}", "model.path: images are encoded by a local pipeline"),
        ("train: photos", "train: [photos, held]", "tasks.dog.train: a denoiser reads one folder"),
        ("test: held", "test: nothing", "nothing: is no folder of images"),
        ("polish:", "correct: {limit: auto}\npolish:", "correct.limit: auto chooses by the loss on texts"),
        ("train: {lora", "train: {method: dpo, lora", "train.method: a denoiser learns pictures"),
        ("resolution: 32", "resolution: 3", "images.resolution"),
        ("prompts: [a dog on the moon]", "prompts: []", "samples.prompts"),
    ],
)
def test_what_does_not_fit_images_is_refused(project: Path, old: str, new: str, message: str) -> None:
    (project / "m.yaml").write_text(MANIFEST.replace(old, new, 1))
    with pytest.raises(InputError, match=message):
        load_manifest(project / "m.yaml")
