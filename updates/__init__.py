"""Update rules: how a parameter moves by its gradient. They know nothing of processes and banks."""
