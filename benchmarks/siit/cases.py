"""The folder written for each model: config.json, model.safetensors, edges.json, meta.json, data.safetensors.

Node names: `input`, `a0.h1`, `m0`, `logits`. `effective_edges` is the truth to score edges against.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.siit.certify import THRESHOLD, Certificate
from benchmarks.siit.network import Shape
from benchmarks.siit.train import Trained
from tl_circuitlasso.data.storage import write_atomically, write_text

DATA_SEED = 20_000


def config(shape: Shape) -> dict[str, Any]:
    """HookedTransformerConfig fields, enough to rebuild the network."""
    return {
        "n_layers": shape.layers,
        "n_heads": shape.heads,
        "d_model": shape.d_model,
        "d_head": shape.d_head,
        "d_mlp": shape.d_mlp,
        "d_vocab": shape.vocabulary,
        "d_vocab_out": shape.outputs,
        "n_ctx": shape.length,
        "act_fn": "gelu_new",
        "normalization_type": shape.norm,
        "attention_dir": "causal",
        "positional_embedding_type": "standard",
        "eps": 1e-5,
        "attn_only": False,
        "init_weights": False,
        "default_prepend_bos": False,
        "model_name": "custom",
        "device": "cpu",
        "dtype": "float32",
        "seed": 0,
    }


def edges(trained: Trained, proof: Certificate) -> dict[str, Any]:
    """Planted and candidate edges, and what patching each candidate alone says."""
    nodes = [trained.placement[each.name] for each in trained.task.variables[:-1]]
    others = [node for node in trained.network.shape.writers()[1:] if node not in nodes]
    return {
        "granularity": "head level; the q, k and v inputs of a head are one edge except in *_qkv",
        "gt_edges": proof.true_edges,
        "flow_edges": proof.true_edges,
        "effective_edges": proof.effective_edges,
        "flow_edges_qkv": [
            *(edge for edge in proof.true_edges if not edge[1].startswith("a")),
            *((u, f"{v}.{port}") for u, v, port in proof.effective_ports if (u, v) in proof.true_edges),
        ],
        "false_effective_edges": proof.false_effective_edges,
        "candidate_edges": trained.network.shape.candidate_edges(),
        "gt_nodes": ["input", *nodes, "logits"],
        "circuit_nodes": nodes,
        "nodes_not_in_circuit": others,
        "variables": trained.placement,
        "single_edge_effects": {f"{u}->{v}": effect for (u, v), effect in proof.effects.items()},
        "single_port_effects": {f"{u}->{v}.{port}": effect for (u, v, port), effect in proof.port_effects.items()},
    }


def meta(trained: Trained, proof: Certificate, name: str) -> dict[str, Any]:
    """What the case is, how it was trained, and how well it holds."""
    task = trained.task
    return {
        "case": name,
        "task": task.description,
        "vocab": task.vocabulary,
        "output_type": "classification",
        "output_classes": task.classes,
        "counted_positions": (task.weight > 0).nonzero()[:, 0].tolist(),
        "seq_len": len(task.weight),
        "causal": True,
        "n_params": sum(value.numel() for value in trained.network.parameters()),
        "training": {"recipe": asdict(trained.recipe), "seconds": round(trained.seconds, 1)},
        "training_history": trained.history,
        "accuracy": proof.accuracy,
        "interchange_accuracy": proof.interchange,
        "all_other_edges_patched_accuracy": proof.strict,
        "effect": "mean KL(clean || patched) in nats over counted positions, one edge patched alone",
        "threshold": f"{THRESHOLD} of the largest effect",
        "weakest_planted_over_strongest_other": proof.gap,
        "certified": proof.certified,
    }


def write_case(trained: Trained, proof: Certificate, folder: Path, prompts: int = 1000) -> None:
    """Write the folder; the prompts are new, neither trained on in this order nor certified with."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(DATA_SEED)
    tokens = trained.task.sample(prompts, generator)
    other = trained.task.counterpart(tokens, generator)
    data = {
        "clean_tokens": tokens,
        "corrupt_tokens": other,
        "clean_targets": trained.task.run(tokens),
        "corrupt_targets": trained.task.run(other),
    }
    write_safetensors(folder / "data.safetensors", {name: value.to(torch.int16) for name, value in data.items()})
    write_safetensors(folder / "model.safetensors", trained.network.tl_state())
    write_json(folder / "config.json", config(trained.network.shape))
    write_json(folder / "edges.json", edges(trained, proof))
    write_json(folder / "meta.json", meta(trained, proof, folder.name))


def write_demo(trained: Trained, proof: Certificate, folder: Path) -> None:
    """Write the four files that tl_circuitlasso.demo loads."""
    folder.mkdir(parents=True, exist_ok=True)
    found, record = edges(trained, proof), meta(trained, proof, "demo")
    circuit = {
        "true_edges": found["effective_edges"],
        "true_edges_qkv": found["flow_edges_qkv"],
        "true_nodes": found["gt_nodes"],
        "candidate_edges": found["candidate_edges"],
        "roles": {node: name for name, node in trained.placement.items()},
        "single_edge_effects": found["single_edge_effects"],
        "single_port_effects": found["single_port_effects"],
        "record": {name: value for name, value in record.items() if name not in ("vocab", "output_classes")},
    }
    write_safetensors(folder / "model.safetensors", trained.network.tl_state())
    write_json(folder / "config.json", config(trained.network.shape))
    write_json(folder / "vocabulary.json", {"words": trained.task.vocabulary})
    write_json(folder / "circuit.json", circuit)


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    write_atomically(path, lambda temporary: save_file(tensors, temporary))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")
