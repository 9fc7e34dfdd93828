"""One file per op of the `mpc` dialect; `runtime.op.load_all` imports them all."""
