"""The bundle: an exported generator and what belongs to it, as a folder of JSON and safetensors.

::

    manifest.json                     what it is (Manifest), and size and SHA-256 of every other file
    generator.safetensors             large ones: generator-00001-of-0000N.safetensors and an index
    confidence_head.safetensors       only with a head
    generator_2.safetensors           only with a second expert
    codec/model.safetensors
    text_encoder/model.safetensors
    tokenizer/tokenizer.json          with text encoders that have one
    image_encoder/model.safetensors   only where the generator reads image rows

Nothing else is read, nothing is executed, and no path leaves the folder. `open_bundle` checks all of it
without loading a tensor, `Bundle.expect` compares the headers with a model's shapes, `Bundle.load` maps and
copies.
"""

from dsa_rt.bundle.describe import describe, describe_plan, describe_plan_text, describe_text
from dsa_rt.bundle.manifest import MANIFEST, FileEntry, Latent, Manifest, Part, Schedule, Size
from dsa_rt.bundle.reader import ASSETS, COMPONENTS, Bundle, open_bundle
from dsa_rt.bundle.tensors import TensorEntry
from dsa_rt.bundle.writer import write_bundle, write_manifest

__all__ = [
    "ASSETS",
    "COMPONENTS",
    "MANIFEST",
    "Bundle",
    "FileEntry",
    "Latent",
    "Manifest",
    "Part",
    "Schedule",
    "Size",
    "TensorEntry",
    "describe",
    "describe_plan",
    "describe_plan_text",
    "describe_text",
    "open_bundle",
    "write_bundle",
    "write_manifest",
]
