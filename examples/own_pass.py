"""A pass outside of mergec: replaces GELU by ReLU, which changes the function.

Here it is passed as an argument. A package offers it to every compile with an entry point:

    [options.entry_points]
    mergec.passes =
        relu_for_gelu = my_package.my_module:ReluForGelu

Because it is lossy, it then runs only on request: `mergec compile … --enable relu_for_gelu`.
"""

from __future__ import annotations

import torch
from torch import fx
from transformers import GPT2Config, GPT2LMHeadModel

from mergec import CompileConfig, compile_decoder
from mergec.compiler.graph.ir import calls, is_shared, replace
from mergec.compiler.graph.rewriting import Pass
from mergec.runtime.core.op import target


class ReluForGelu(Pass):
    """ReLU needs one comparison; GELU needs a table lookup as well.

    Before:
        %x = input : shared 1xnewx8
        %1 = mpc.gelu(%x)
    After:
        %1 = mpc.relu(%x)
    """

    stage = "approximate"  # after "fuse", where the GELU is found
    exact = False

    def run(self, graph_module: fx.GraphModule) -> int:
        found = [node for node in graph_module.graph.nodes if calls(node, target("gelu"))]
        sites = 0
        for node in found:
            if is_shared(node):
                replace(node, target("relu"), (node.args[0],))
                sites += 1
            else:
                self.skip(node, "one party knows the operand, so computing GELU is free")
        return sites


def main() -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=96, n_embd=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None
    )
    model = GPT2LMHeadModel(config)
    for passes in ((), (ReluForGelu,)):
        program = compile_decoder(model, config=CompileConfig(extra_passes=passes))
        total = program.inspect(new=1, past=16).total
        print(f"{total.rounds} rounds, {total.online:,} B online: {program.describe()}")


if __name__ == "__main__":
    main()
