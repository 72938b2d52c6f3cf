"""`fastpeft compare`: trains PEFT methods side by side on the same split of real text."""
