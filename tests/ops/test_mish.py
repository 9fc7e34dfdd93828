"""A decoder whose MLP calls mish, and mish where cubics fit it least."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mergec.compiler.config import CompileConfig
from mergec.compiler.driver import compile_decoder
from mergec.runtime.engine.simulate import Simulation
from mergec.runtime.ops.mish import Mish
from tests.session import play

PROMPT, ANSWER = [5, 17, 3, 88, 41], [7, 9]
LOGIT_ERROR = 5e-3
"""Of logits up to 1.2, after two layers."""


def test_private_logits_are_the_models() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            hidden_act="mish",
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
        wanted = model(torch.tensor([PROMPT + ANSWER])).logits[0, len(PROMPT) - 1 :].double()
    program = compile_decoder(model, config=CompileConfig(max_length=16, logit_noise=0.0))
    assert sum(item.target == "mpc.mish" for item in program.any_role.instructions) == 2
    steps = play(program.roles, [PROMPT, *([token] for token in ANSWER)])
    found = torch.stack([step.logits.reshape(-1, 97)[-1] for step in steps]).double()
    assert float((found - wanted).abs().max()) < LOGIT_ERROR < 0.1 * float(wanted.abs().max())


def test_every_input_around_zero() -> None:
    """Where the fourth derivative is largest, which cubics leave out."""
    x = torch.arange(-(2**16), 2**16, dtype=torch.float64) * 2.0**-16
    simulation = Simulation()
    shares = simulation.share(x)
    results = simulation.run(lambda ctx, party: Mish.protocol(ctx, shares[party]))
    assert float((simulation.reveal(results) - Mish.reference(x)).abs().max()) < 3e-5
