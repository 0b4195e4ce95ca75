"""Before anything is rented: what a run would take, by formulas."""
