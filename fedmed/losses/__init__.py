"""What training minimises. One loss is one function in a module of the same name.

A loss takes `logits` of shape (B, L, ...) and `labels` of shape (B, ...), where "..."
is I J, I J K or nothing (classification), and gives a scalar. Voxels labelled
`fedmed.case.UNKNOWN_LABEL` take no part; a batch of nothing else gives 0 with zero
gradient. `fedmed.losses.build.build_loss` makes a loss from its name in a study.
"""
