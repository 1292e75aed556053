package conf

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/q-ipsec/q-ipsec/kms/pki"
)

// nodeFiles looks at what the config names on disk. What qipsecd makes itself
// (state directory, sockets) may be absent.
func (r *reader) nodeFiles(n *Node) {
	if err := CheckDir(n.StateDir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		r.fault("node.state_dir", "%v", err)
	} else {
		r.secret("node.root_file", n.RootFile)
	}
	if filepath.IsAbs(n.RootCredential) {
		r.secret("node.root_credential", n.RootCredential)
	}
	if n.InventoryPassword != "" {
		r.secret("node.inventory_password_file", n.InventoryPassword)
	}
	r.dirOf("operator.socket", n.Operator.Socket)
	r.intakesApart(n, resolved)
	if k := n.KMS; k != nil {
		r.certificate("tls.km", k.Type1)
		if k.Type2Listen.IsValid() {
			r.certificate("tls.sae", k.Type2)
		}
		for i, p := range k.Pairs {
			at := fmt.Sprintf("kms.pair[%d].", i)
			if p.Intake != "" {
				r.intake(at, p)
			}
		}
	}
	if v := n.IPsec; v != nil {
		r.dirOf("ipsec.vici", v.VICI)
		r.dirOf("ipsec.plugin", v.Plugin)
		r.certificate("ipsec", v.Files)
		for i, k := range v.KMEs {
			r.certificate(fmt.Sprintf("ipsec.kme[%d]", i), k.Files)
		}
	}
}

func (r *reader) certificate(at string, f pki.Files) {
	if f.CA != "" && r.trusted(at+".ca", f.CA) {
		if _, err := pki.Pool(f.CA); err != nil {
			r.fault(at+".ca", "%v", err)
		}
	}
	if f.Key == "" || f.Cert == "" {
		return
	}
	if err := pki.CheckSecret(f.Key); err != nil {
		r.fault(at+".key", "%v", err)
		return
	}
	r.dirOf(at+".key", f.Key)
	if !r.trusted(at+".cert", f.Cert) {
		return
	}
	if _, err := tls.LoadX509KeyPair(f.Cert, f.Key); err != nil {
		r.fault(at+".cert", "with its key: %v", err)
	}
}

// secret checks a file that holds a secret and may not be there yet.
func (r *reader) secret(field, name string) {
	if err := pki.CheckSecret(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		r.fault(field, "%v", err)
	}
	r.dirOf(field, name)
}

// trusted checks a file that others may read but not change, nor exchange in its
// directory. One that is not there is left to whoever opens it.
func (r *reader) trusted(field, name string) bool {
	if err := checkUnwritable(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		r.fault(field, "%v", err)
		return false
	}
	r.dirOf(field, name)
	return true
}

// dirOf checks that others can exchange no file in the directory of name, and in
// that of the file which name is a link to. Each directory is reported once.
func (r *reader) dirOf(field, name string) {
	for _, dir := range []string{filepath.Dir(name), filepath.Dir(resolved(name))} {
		if r.dirs[dir] {
			continue
		}
		if r.dirs == nil {
			r.dirs = map[string]bool{}
		}
		r.dirs[dir] = true
		if err := checkUnwritable(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
			r.fault(field, "%v", err)
		}
	}
}

// resolved is the file that name is a link to; name itself if that cannot be told.
func resolved(name string) string {
	if real, err := filepath.EvalSymlinks(name); err == nil {
		return real
	}
	return name
}

// checkUnwritable reports what lets others change a file or directory.
func checkUnwritable(name string) error {
	fi, err := os.Stat(name)
	if err != nil {
		return fmt.Errorf("conf: %w", err)
	}
	if m := fi.Mode().Perm(); m&0o022 != 0 {
		return fmt.Errorf("conf: %s has mode %#o: others can change it; chmod go-w it", name, m)
	}
	return checkOwner(name, fi)
}

func checkOwner(name string, fi fs.FileInfo) error {
	if st, ok := fi.Sys().(*syscall.Stat_t); ok && st.Uid != 0 && int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("conf: %s belongs to uid %d: chown it to root or to the daemon's user", name, st.Uid)
	}
	return nil
}

// private checks the config file of a node itself, and its directory: 0600 and 0700.
func (r *reader) private(name string) {
	name = resolved(name)
	if err := CheckDir(filepath.Dir(name)); err != nil {
		r.fault("", "%v", err)
	}
	if err := pki.CheckSecret(name); err != nil {
		r.fault("", "%v", err)
	}
}

// intakesApart refuses an intake directory with anything else in it that the node
// needs: whatever is no QKD-Key file there, qipsecd overwrites and removes. real
// resolves links, where there is a disk to look at.
func (r *reader) intakesApart(n *Node, real func(string) string) {
	if n.KMS == nil {
		return
	}
	needed := n.files()
	needed = append(needed, namedFile{"the config's directory", r.dir}, namedFile{"node.state_dir", n.StateDir})
	for i, p := range n.KMS.Pairs {
		needed = append(needed, namedFile{fmt.Sprintf("kms.pair[%d].intake", i), p.Intake})
	}
	for i, p := range n.KMS.Pairs {
		field := fmt.Sprintf("kms.pair[%d].intake", i)
		if p.Intake == "" || slices.ContainsFunc(r.faults, func(f Fault) bool { return f.Field == field }) {
			continue
		}
		intake := real(p.Intake)
		for _, f := range needed {
			switch path := real(f.name); {
			case f.name == "" || f.field == field:
				continue
			case within(path, intake):
				r.fault(field, "%s: %s, %s, lies there: all that is no QKD-Key file is destroyed in an intake directory; give it a directory of its own", intake, f.field, path)
			case f.field == "node.state_dir" && within(intake, path):
				r.fault(field, "%s lies in node.state_dir, %s, which is the inventory's alone", intake, path)
			default:
				continue
			}
			break
		}
	}
}

// within tells whether path is dir or below it.
func within(path, dir string) bool {
	rel, err := filepath.Rel(dir, path)
	return err == nil && rel != ".." && !strings.HasPrefix(rel, "../")
}

// namedFile is a file or socket and the field that names it.
type namedFile struct{ field, name string }

// files gives every file and socket that the config names.
func (n *Node) files() []namedFile {
	all := []namedFile{{"node.root_file", n.RootFile}, {"operator.socket", n.Operator.Socket}}
	if filepath.IsAbs(n.RootCredential) {
		all = append(all, namedFile{"node.root_credential", n.RootCredential})
	}
	if path, ok := strings.CutPrefix(n.Inventory, sqliteURL); ok {
		all = append(all, namedFile{"node.inventory", path})
	}
	if n.InventoryPassword != "" {
		all = append(all, namedFile{"node.inventory_password_file", n.InventoryPassword})
	}
	channel := func(at string, f pki.Files) {
		all = append(all, namedFile{at + ".ca", f.CA}, namedFile{at + ".cert", f.Cert}, namedFile{at + ".key", f.Key})
	}
	if k := n.KMS; k != nil {
		channel("tls.km", k.Type1)
		channel("tls.sae", k.Type2)
	}
	if v := n.IPsec; v != nil {
		all = append(all, namedFile{"ipsec.vici", v.VICI}, namedFile{"ipsec.plugin", v.Plugin})
		channel("ipsec", v.Files)
		for i, k := range v.KMEs {
			channel(fmt.Sprintf("ipsec.kme[%d]", i), k.Files)
		}
	}
	return all
}

func (r *reader) intake(at string, p Pair) {
	uid, err := FeederUID(p.Feeder)
	if err != nil {
		r.fault(at+"feeder", "%v", err)
	}
	fi, err := os.Stat(p.Intake)
	switch {
	case err != nil:
		r.fault(at+"intake", "%v", err)
	case !fi.IsDir():
		r.fault(at+"intake", "%s is not a directory", p.Intake)
	case fi.Mode().Perm()&0o007 != 0:
		r.fault(at+"intake", "%s has mode %#o: everybody can reach it; chmod o= it", p.Intake, fi.Mode().Perm())
	case fi.Mode().Perm()&0o020 != 0: // intake would refuse it, for ever
		r.fault(at+"intake", "%s has mode %#o: a group can write there; chmod g-w it and make the feeder its owner", p.Intake, fi.Mode().Perm())
	default:
		if st, ok := fi.Sys().(*syscall.Stat_t); ok && st.Uid != 0 && int(st.Uid) != os.Geteuid() && int(st.Uid) != uid {
			r.fault(at+"intake", "%s belongs to uid %d, who is neither root nor us nor the feeder", p.Intake, st.Uid)
		}
	}
}

// FeederUID is the user id of a pair's feeder: our own if name is empty.
func FeederUID(name string) (int, error) {
	if name == "" {
		return os.Geteuid(), nil
	}
	if uid, err := strconv.ParseUint(name, 10, 31); err == nil {
		return int(uid), nil
	}
	u, err := user.Lookup(name)
	if err != nil {
		return 0, fmt.Errorf("conf: %w", err)
	}
	uid, err := strconv.Atoi(u.Uid)
	if err != nil {
		return 0, fmt.Errorf("conf: uid of %s: %w", name, err)
	}
	return uid, nil
}

// CheckDir reports what makes a directory unfit for secrets: it must be a real
// directory, of root or of our own user, closed to everybody else. An absent
// one gives an error that wraps fs.ErrNotExist.
func CheckDir(name string) error {
	fi, err := os.Lstat(name)
	if err != nil {
		return fmt.Errorf("conf: %w", err)
	}
	if !fi.IsDir() {
		return fmt.Errorf("conf: %s is not a directory", name)
	}
	if m := fi.Mode().Perm(); m&0o077 != 0 {
		return fmt.Errorf("conf: %s has mode %#o: chmod 700 it", name, m)
	}
	return checkOwner(name, fi)
}
