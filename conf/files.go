package conf

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"strconv"
	"syscall"

	"github.com/q-ipsec/q-ipsec/kms/pki"
)

// nodeFiles looks at what the config names on disk. What qipsecd makes itself
// (state directory, sockets) may be absent.
func (r *reader) nodeFiles(n *Node) {
	if err := CheckDir(n.StateDir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		r.fault("node.state_dir", "%v", err)
	}
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
		r.certificate("ipsec", v.Files)
		for i, k := range v.KMEs {
			r.certificate(fmt.Sprintf("ipsec.kme[%d]", i), k.Files)
		}
	}
}

func (r *reader) certificate(at string, f pki.Files) {
	if f.CA != "" {
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
	if _, err := tls.LoadX509KeyPair(f.Cert, f.Key); err != nil {
		r.fault(at+".cert", "with its key: %v", err)
	}
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
	if st, ok := fi.Sys().(*syscall.Stat_t); ok && st.Uid != 0 && int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("conf: %s belongs to uid %d: chown it to root or to the daemon's user", name, st.Uid)
	}
	return nil
}
