// Package vicitest plays charon's end of a VICI socket for tests: the packet
// framing, the commands that qipsecd uses, and a small model of connections and
// SAs behind them. It is not part of any program.
package vicitest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"sync"
	"testing"
)

// Packet types of the wire format.
const (
	cmdRequest      = 0
	cmdResponse     = 1
	cmdUnknown      = 2
	eventRegister   = 3
	eventUnregister = 4
	eventConfirm    = 5
	eventUnknown    = 6
	event           = 7
)

const maxPacket = 512 * 1024

// IKE is an IKE_SA of the model.
type IKE struct {
	Conn          string
	ID            uint32
	State         string
	Local, Remote string
	Responder     bool     // the peer has begun it
	Queued        []string // tasks, by charon's names
	RemotePort    int
	Children      []Child
}

// Child is a CHILD_SA of the model.
type Child struct {
	Name          string
	ID            uint32
	State         string
	SPIIn, SPIOut uint32
}

// Call is one command that was received.
type Call struct {
	Name    string
	Message Message
}

// Charon is a charon that only speaks VICI. Its fields may be changed under
// Lock.
type Charon struct {
	sync.Mutex
	Version string
	Plugins []string
	Conns   map[string]Message // loaded connections
	Keys    map[string]string  // loaded private keys by id
	IKEs    []IKE
	// Fail makes a command fail with that errmsg.
	Fail map[string]string
	// Hang makes a command have no answer.
	Hang map[string]bool
	// OnInitiate is called, unlocked, when a child is initiated.
	OnInitiate func(conn, child string)

	t        testing.TB
	socket   string
	listener net.Listener
	peers    map[*peer]bool
	calls    []Call
	all      sync.WaitGroup
}

// peer is one client's connection.
type peer struct {
	net.Conn
	write  sync.Mutex
	events map[string]bool // under Charon's lock
}

// Start listens on socket until the test ends.
func Start(t testing.TB, socket string) *Charon {
	t.Helper()
	c := &Charon{
		t: t, socket: socket, Version: "5.9.8", Plugins: []string{"aes", "vici", "qipsec"},
		Conns: map[string]Message{}, Keys: map[string]string{}, Fail: map[string]string{}, Hang: map[string]bool{}, peers: map[*peer]bool{},
	}
	c.Listen()
	t.Cleanup(c.Stop)
	return c
}

// Listen starts to serve, again after Stop.
func (c *Charon) Listen() {
	c.t.Helper()
	l, err := net.Listen("unix", c.socket)
	if err != nil {
		c.t.Fatal(err)
	}
	c.Lock()
	c.listener = l
	c.Unlock()
	c.all.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			p := &peer{Conn: conn, events: map[string]bool{}}
			c.Lock()
			c.peers[p] = true
			c.Unlock()
			c.all.Go(func() { c.serve(p) })
		}
	})
}

// Stop dies as charon does: connections, keys and SAs are lost with it.
func (c *Charon) Stop() {
	c.Lock()
	_ = c.listener.Close()
	for p := range c.peers {
		_ = p.Close()
	}
	c.Conns, c.Keys, c.IKEs = map[string]Message{}, map[string]string{}, nil
	c.Unlock()
	c.all.Wait()
}

// Cut ends the sessions that have asked for no event: those for commands.
func (c *Charon) Cut() {
	c.Lock()
	defer c.Unlock()
	for p := range c.peers {
		if len(p.events) == 0 {
			_ = p.Close()
		}
	}
}

// Calls gives the commands of that name so far, all of them for "".
func (c *Charon) Calls(name string) []Call {
	c.Lock()
	defer c.Unlock()
	var out []Call
	for _, call := range c.calls {
		if name == "" || call.Name == name {
			out = append(out, call)
		}
	}
	return out
}

// Emit sends an event to everyone who registered for it.
func (c *Charon) Emit(name string, m Message) {
	c.Lock()
	var to []*peer
	for p := range c.peers {
		if p.events[name] {
			to = append(to, p)
		}
	}
	c.Unlock()
	for _, p := range to {
		p.packet(event, name, m.encode(nil))
	}
}

// EmitRaw sends an event with any bytes as its message.
func (c *Charon) EmitRaw(name string, b []byte) {
	c.Lock()
	defer c.Unlock()
	for p := range c.peers {
		if p.events[name] {
			p.packet(event, name, b)
		}
	}
}

// Header sends a bare length prefix to every client.
func (c *Charon) Header(n uint32) {
	c.Lock()
	defer c.Unlock()
	for p := range c.peers {
		_, _ = p.Write(binary.BigEndian.AppendUint32(nil, n))
	}
}

// packet writes one packet; a client that is gone is no error here.
func (p *peer) packet(kind byte, title string, body []byte) {
	b := []byte{kind}
	if kind == event {
		b = name(b, title)
	}
	b = append(b, body...)
	p.write.Lock()
	defer p.write.Unlock()
	_, _ = p.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...))
}

func (c *Charon) serve(p *peer) {
	defer func() {
		_ = p.Close()
		c.Lock()
		delete(c.peers, p)
		c.Unlock()
	}()
	for {
		if err := c.next(p); err != nil {
			if !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
				c.t.Errorf("vicitest: %v", err)
			}
			return
		}
	}
}

// next serves one packet.
func (c *Charon) next(p *peer) error {
	var head [4]byte
	if _, err := io.ReadFull(p, head[:]); err != nil {
		return io.EOF // a reset is as good as an end
	}
	n := binary.BigEndian.Uint32(head[:])
	if n == 0 || n > maxPacket {
		return fmt.Errorf("packet of %d bytes", n)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(p, b); err != nil {
		return io.EOF
	}
	title, rest, err := counted(b[1:], 1)
	if err != nil {
		return err
	}
	switch b[0] {
	case cmdRequest:
		m, err := Decode(rest)
		if err != nil {
			return fmt.Errorf("%s: %w", title, err)
		}
		answer, known := c.command(p, title, m)
		c.Lock()
		hang := c.Hang[title]
		c.Unlock()
		if hang {
			return nil
		}
		if !known {
			p.packet(cmdUnknown, "", nil)
			return nil
		}
		p.packet(cmdResponse, "", answer.encode(nil))
	case eventRegister, eventUnregister:
		known := []string{"ike-updown", "child-updown", "child-rekey", "list-sa"}
		if !slices.Contains(known, title) {
			p.packet(eventUnknown, "", nil)
			return nil
		}
		c.Lock()
		p.events[title] = b[0] == eventRegister
		c.Unlock()
		p.packet(eventConfirm, "", nil)
	default:
		return fmt.Errorf("packet type %d from a client", b[0])
	}
	return nil
}

// command runs one command; known is false for one that charon has not.
func (c *Charon) command(p *peer, title string, m Message) (answer Message, known bool) {
	c.Lock()
	c.calls = append(c.calls, Call{title, m})
	fail := c.Fail[title]
	c.Unlock()
	if fail != "" {
		return Message{V("success", "no"), V("errmsg", fail)}, true
	}
	ok := Message{V("success", "yes")}
	switch title {
	case "version":
		c.Lock()
		defer c.Unlock()
		return Message{V("daemon", "charon-systemd"), V("version", c.Version)}, true
	case "stats":
		c.Lock()
		defer c.Unlock()
		return Message{S("uptime", V("running", "1 second")), L("plugins", c.Plugins...)}, true
	case "load-conn":
		c.Lock()
		defer c.Unlock()
		for _, e := range m {
			c.Conns[e.Key] = e.Section
		}
		return ok, true
	case "unload-conn":
		return c.unload(m)
	case "get-conns":
		c.Lock()
		defer c.Unlock()
		list := L("conns")
		for conn := range c.Conns {
			list.List = append(list.List, conn)
		}
		return Message{list}, true
	case "load-key":
		c.Lock()
		defer c.Unlock()
		id := fmt.Sprintf("%02x", len(c.Keys)+1)
		c.Keys[id] = m.Text("data")
		return append(ok, V("id", id)), true
	case "unload-key":
		c.Lock()
		defer c.Unlock()
		delete(c.Keys, m.Text("id"))
		return ok, true
	case "initiate":
		return c.initiate(m)
	case "rekey":
		return append(ok, V("matches", "1")), true
	case "terminate":
		return c.terminate(m)
	case "list-sas":
		c.list(p)
		return Message{}, true
	}
	return nil, false
}

func (c *Charon) unload(m Message) (Message, bool) {
	c.Lock()
	defer c.Unlock()
	if _, there := c.Conns[m.Text("name")]; !there {
		return Message{V("success", "no"), V("errmsg", "not found")}, true
	}
	delete(c.Conns, m.Text("name"))
	return Message{V("success", "yes")}, true
}

func (c *Charon) initiate(m Message) (Message, bool) {
	c.Lock()
	_, there := c.Conns[m.Text("ike")]
	hook := c.OnInitiate
	c.Unlock()
	if !there {
		return Message{V("success", "no"), V("errmsg", "CHILD_SA config not found")}, true
	}
	if hook != nil {
		hook(m.Text("ike"), m.Text("child"))
	}
	return Message{V("success", "yes")}, true
}

func (c *Charon) terminate(m Message) (Message, bool) {
	id, _ := strconv.ParseUint(m.Text("child-id"), 10, 32)
	n := 0
	var gone []IKE
	c.Lock()
	c.IKEs = slices.DeleteFunc(c.IKEs, func(i IKE) bool {
		if m.Text("ike") != "" && i.Conn == m.Text("ike") {
			n++
			gone = append(gone, i)
			return true
		}
		return false
	})
	for i := range c.IKEs {
		ike := &c.IKEs[i]
		ike.Children = slices.DeleteFunc(slices.Clone(ike.Children), func(ch Child) bool {
			if id == 0 || uint64(ch.ID) != id {
				return false
			}
			n++
			one := *ike
			one.Children = []Child{ch}
			gone = append(gone, one)
			return true
		})
	}
	c.Unlock()
	for _, i := range gone {
		c.Emit("child-updown", Message{i.section()})
	}
	if n == 0 {
		return Message{V("success", "no"), V("matches", "0"), V("errmsg", "no matching SAs to terminate found")}, true
	}
	return Message{V("success", "yes"), V("matches", strconv.Itoa(n)), V("terminated", strconv.Itoa(n))}, true
}

// list sends the list-sa events of one list-sas.
func (c *Charon) list(p *peer) {
	c.Lock()
	ikes := slices.Clone(c.IKEs)
	on := p.events["list-sa"]
	c.Unlock()
	if !on {
		return
	}
	for _, i := range ikes {
		p.packet(event, "list-sa", Message{i.section()}.encode(nil))
	}
}

// SetIKEs replaces all SAs, without events.
func (c *Charon) SetIKEs(ikes ...IKE) {
	c.Lock()
	defer c.Unlock()
	c.IKEs = ikes
}

// Up is the event that the CHILD_SAs of i are up.
func (i IKE) Up() Message { return Message{V("up", "yes"), i.section()} }

// section is i as charon writes it in list-sa and in events.
func (i IKE) section() Element {
	children := S("child-sas")
	for _, ch := range i.Children {
		children.Section = append(children.Section, ch.section())
	}
	role := V("initiator", "yes")
	if i.Responder {
		role = V("responder", "yes")
	}
	tasks := L("tasks-queued", i.Queued...)
	return S(i.Conn, V("uniqueid", strconv.Itoa(int(i.ID))), V("version", "2"), V("state", i.State),
		V("local-host", i.Local), V("remote-host", i.Remote), V("remote-port", strconv.Itoa(i.RemotePort)), role, V("established", "3"), tasks, children)
}

func (ch Child) section() Element {
	return S(fmt.Sprintf("%s-%d", ch.Name, ch.ID), V("name", ch.Name), V("uniqueid", strconv.Itoa(int(ch.ID))),
		V("state", ch.State), V("protocol", "ESP"), V("spi-in", fmt.Sprintf("%08x", ch.SPIIn)),
		V("spi-out", fmt.Sprintf("%08x", ch.SPIOut)), V("bytes-in", "10"), V("bytes-out", "20"), V("install-time", "2"))
}
