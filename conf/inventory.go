package conf

import (
	"net/url"
	"path/filepath"
	"strings"
)

const sqliteURL = "sqlite:"

func postgres(url string) bool {
	return strings.HasPrefix(url, "postgres://") || strings.HasPrefix(url, "postgresql://")
}

// Shared tells whether the inventory is one that several machines can share.
func (n *Node) Shared() bool { return postgres(n.Inventory) }

// inventory takes the URL of the database. No fault shows any of it, as it may
// hold a password.
func (r *reader) inventory(n *Node, raw rawNodeSection) {
	n.Inventory = sqliteURL + filepath.Join(n.StateDir, "inventory.db")
	text := raw.Inventory
	path, file := strings.CutPrefix(text, sqliteURL)
	switch {
	case text == "":
	case file && filepath.IsAbs(path), postgres(text):
		n.Inventory = text
	default:
		r.fault("node.inventory", "want sqlite:/PATH or postgres://HOST/DATABASE")
	}
	if raw.InventoryPassword != "" {
		n.InventoryPassword = r.path("node.inventory_password_file", raw.InventoryPassword, "")
		if !n.Shared() {
			r.fault("node.inventory_password_file", "only PostgreSQL takes a password: set node.inventory to its URL")
		}
	}
	if n.Shared() {
		r.server(n)
	}
}

// server checks what can be seen of a PostgreSQL URL without connecting; the rest
// the store says when it connects.
func (r *reader) server(n *Node) {
	// A socket directory as host, as libpq writes it, is not for net/url.
	u, err := url.Parse(strings.NewReplacer("%2F", "_", "%2f", "_").Replace(n.Inventory))
	if err != nil {
		r.fault("node.inventory", "is not a URL: special characters of a password are written as %%XX")
		return
	}
	q, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		r.fault("node.inventory", "its parameters cannot be read")
		return
	}
	if strings.Trim(u.Path, "/") == "" && q.Get("dbname") == "" && q.Get("service") == "" {
		r.fault("node.inventory", "names no database")
	}
	if _, password := u.User.Password(); (password || q.Has("password")) && n.InventoryPassword != "" {
		r.fault("node.inventory", "has a password, and so has node.inventory_password_file")
	}
}
