package key

// Computed outside this project with Python's hmac module.
const fingerprintVector = "69a9c49ce1155884"

var deriveVectors = []struct {
	seq   uint64
	index uint32
	want  string
}{
	{1, 0, "703f7b6f-e4c3-8dc3-afb9-3e9f72c998ed"},
	{1, 1, "f7292465-1e93-8e32-892b-078f74f6762a"},
	{2, 0, "303e7323-4e0e-85a7-9add-a6de8b9bc2bf"},
	{8796093022207, 1048575, "37321bb7-e792-8065-a56a-32d25c20e7fd"},
}
