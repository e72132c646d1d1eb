"""Update rules: how a gradient changes a parameter. Rules are independent of processes and banks."""
