"""A policy over a whole run of one image: DDIM with guidance on all channels, decisions and latents recorded."""

import torch

from step import Run, Step


def sample(net, solver, num_steps, label, noise, guidance, make_policy):
    """noise [C, S, S]. Returns the latents after every step and one dict a step: kind, statistic, threshold, edges."""
    run = Run(net, solver, num_steps, [label, net.null_class])
    policy = make_policy(run)
    x, latents, steps = noise.to(net.dtype), [], []
    with torch.no_grad():
        for s in range(num_steps):
            st = Step(run, s, x)
            st.edges = []
            out = st.eps_cols(policy.step(st))
            eps = net.unpatchify(out[1] + guidance * (out[0] - out[1]))
            x = solver.step(s, x, eps)
            latents.append(x)
            steps.append({"kind": st.kind, "statistic": st.statistic, "threshold": st.threshold, "edges": st.edges})
    return latents, steps, policy
