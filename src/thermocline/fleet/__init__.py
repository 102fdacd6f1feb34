"""The fleet: what each instance holds, which one a request goes to, what is worth copying between them."""
