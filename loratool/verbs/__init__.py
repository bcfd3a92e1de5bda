"""What loratool does, one function or one package for each verb."""
