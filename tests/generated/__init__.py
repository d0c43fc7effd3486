"""Programs that nobody wrote by hand: how they are made, what must hold of them, and how a failing one is cut down."""
