package conf

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"

	"github.com/BurntSushi/toml"
)

// Protected is what a config says that a guard must hold, as far as that can be
// read from one that has faults.
type Protected struct {
	Remotes, Routed []netip.Prefix // as Guarded and Routed give them
	Off             bool           // it says guard = false
	StateDir        string         // the default's where it does not say
}

// ReadProtected reads what is protected from a file that ReadNode refuses: its error
// says that the file cannot be read or is no TOML. Everything that is not understood
// counts as if it asked for protection: a connection with a policy that is no policy,
// or without one, is a required one. Of selectors that are none nothing is known.
//
// It is for blocks alone. What is let pass, loaded or keyed comes from a config
// without faults.
func ReadProtected(name string) (Protected, error) {
	text, dir, err := readConfig(name)
	if err != nil {
		return Protected{StateDir: defaultStateDir}, err
	}
	p, err := parseProtected(dir, text)
	if err != nil {
		return p, fmt.Errorf("conf: %s: %w", name, err)
	}
	return p, nil
}

func parseProtected(dir string, text []byte) (p Protected, err error) {
	p.StateDir = defaultStateDir
	raw := map[string]any{}
	if _, err := toml.Decode(string(text), &raw); err != nil {
		return p, err
	}
	if s, ok := table(raw["node"])["state_dir"].(string); ok && s != "" {
		if !filepath.IsAbs(s) {
			s = filepath.Join(dir, s)
		}
		p.StateDir = filepath.Clean(s)
	}
	v := table(raw["ipsec"])
	if on, ok := v["guard"].(bool); ok && !on {
		p.Off = true
		return p, nil
	}
	for _, c := range tables(v["connection"]) {
		if policy, ok := c["policy"].(string); ok && (Policy(policy) == Optional || Policy(policy) == Off) {
			continue
		}
		for _, ch := range tables(c["child"]) {
			id, _ := ch["if_id_out"].(int64)
			for _, r := range networks(ch["remote_ts"]) {
				to := &p.Remotes
				if id != 0 && r.Bits() > 0 {
					to = &p.Routed
				}
				if !slices.Contains(*to, r) {
					*to = append(*to, r)
				}
			}
		}
	}
	return p, nil
}

// networks gives those of v's texts that name a network or an address.
func networks(v any) (all []netip.Prefix) {
	list, ok := v.([]any)
	if !ok {
		list = []any{v}
	}
	for _, e := range list {
		s, _ := e.(string)
		p, err := netip.ParsePrefix(s)
		if err != nil {
			a, err := netip.ParseAddr(s)
			if err != nil {
				continue
			}
			p = netip.PrefixFrom(a.WithZone(""), a.BitLen())
		}
		if p.Addr().Is4In6() {
			if p.Bits() < 96 {
				continue
			}
			p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
		}
		all = append(all, p.Masked())
	}
	return all
}

func table(v any) map[string]any {
	m, _ := v.(map[string]any)
	return m
}

// tables gives the elements of an array of tables, in either way of writing one.
func tables(v any) (all []map[string]any) {
	switch v := v.(type) {
	case []map[string]any:
		return v
	case []any:
		for _, e := range v {
			if m, ok := e.(map[string]any); ok {
				all = append(all, m)
			}
		}
	case map[string]any: // [ipsec.connection] for [[ipsec.connection]]
		return []map[string]any{v}
	}
	return all
}
