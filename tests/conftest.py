"""One thread, and runtimes of small random bundles (:mod:`tiny`)."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import make_bundle

from dsa_rt.runtime import Runtime, load


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where files run side by side, those with slow tests begin first, so that none of them is alone at the end."""
    if hasattr(config, "workerinput"):
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: more threads cost time, and the machine may be shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """Other random inputs for every test, the same ones in every run of it."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(scope="session")
def causal_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundles") / "causal", "causal")


@pytest.fixture(scope="session")
def causal(causal_bundle: Path) -> Runtime:
    """A streaming runtime with random weights and a head, fp32."""
    return load(causal_bundle, dtype="fp32")


@pytest.fixture(scope="session")
def headless(tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    """The same without a confidence head."""
    return load(make_bundle(tmp_path_factory.mktemp("bundles") / "headless", "causal", with_head=False), dtype="fp32")


@pytest.fixture(scope="session")
def many_step(tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    """A many-step runtime with random weights, three steps, guidance 2.5, fp32."""
    return load(make_bundle(tmp_path_factory.mktemp("bundles") / "many", "bidirectional"), dtype="fp32")
