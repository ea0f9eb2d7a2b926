"""Strict interchange-intervention training: transformers whose circuit is known by construction.

A **task** is a small causal model: variables, each computed from its parents, up to the output. A
**placement** gives every variable a node of the network (`a1.h2`, `m0`). Training makes the network
agree with the causal model under interventions on *edges*: for a random subset of the planted
edges the child reads the parent's output on another prompt, and the network must say what the
causal model says under the same swap; for a random subset of all other edges the same is done, and
nothing may change. What remains is confirmed by patching every edge alone (`certify`).

    tasks      the causal models and their prompts
    network    a GPT-2-shaped transformer in which every edge can be patched
    train      the loss and the loop
    certify    exact patching of every single edge
    cases      the folder written for each model

Sources: Geiger et al. 2022 (interchange intervention training), Gupta et al. 2024 (InterpBench,
the strict form over nodes; here it is over edges).
"""
