"""Networks with named parts, whose normalisation can be switched, also per site."""
